"""Λ-shaped attention as one operation on tensors. Knows nothing of transformers."""

from .attention import explain, lambda_attention, not_supported_reasons
from .implementations import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "explain", "lambda_attention", "not_supported_reasons"]
