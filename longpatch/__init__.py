"""Read and write text of any length with any Hugging Face causal language model."""

from .cache import LambdaCache
from .config import LambdaConfig
from .convert import (
    convert_gpt_j_model,
    convert_llama_model,
    convert_model,
    convert_mpt_model,
    convert_yi_model,
    revert_model,
)
from .errors import LongpatchError
from .temp_lora import TempLoraGenerator, temp_lora
from .recall import Recall

__all__ = [
    "LambdaCache",
    "LambdaConfig",
    "LongpatchError",
    "TempLoraGenerator",
    "Recall",
    "convert_gpt_j_model",
    "convert_llama_model",
    "convert_model",
    "convert_mpt_model",
    "convert_yi_model",
    "revert_model",
    "temp_lora",
]
