"""Recall: bring back what left the window (top-k of LM-Infinite; blocks as in InfLLM)."""

from .settings import Recall

__all__ = ["Recall"]
