"""A model that learns while it writes: temporary low-rank adapters (Temp-LoRA, arXiv 2401.11504)."""

from .learner import Learned, Learner, temp_lora
from .options import LearnOptions

__all__ = ["LearnOptions", "Learned", "Learner", "temp_lora"]
