"""A conversation with a model, of any length."""

from .conversation import Conversation, Reply
from .sampling import Sampling

__all__ = ["Conversation", "Reply", "Sampling"]
