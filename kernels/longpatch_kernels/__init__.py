"""Λ-shaped attention as one operation on tensors. Knows nothing of transformers."""

from .attention import IMPLEMENTATIONS, lambda_attention, not_supported_reasons

__all__ = ["IMPLEMENTATIONS", "lambda_attention", "not_supported_reasons"]
