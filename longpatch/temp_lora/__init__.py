"""A model that learns while it writes: temporary low-rank adapters (Temp-LoRA, arXiv 2401.11504)."""

from .generator import TempLoraGenerator
from .learner import Learned, Learner, temp_lora
from .options import GeneratorOptions, LearnOptions
from .segments import Answer, Segment, generate_segments, read_segments

__all__ = [
    "Answer",
    "GeneratorOptions",
    "LearnOptions",
    "Learned",
    "Learner",
    "Segment",
    "TempLoraGenerator",
    "generate_segments",
    "read_segments",
    "temp_lora",
]
