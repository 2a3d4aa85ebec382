"""A model that learns while it writes: temporary low-rank adapters (Temp-LoRA, arXiv 2401.11504)."""

from .generator import TempLoraGenerator
from .learner import Learned, Learner, temp_lora
from .options import GeneratorOptions, LearnOptions

__all__ = ["GeneratorOptions", "LearnOptions", "Learned", "Learner", "TempLoraGenerator", "temp_lora"]
