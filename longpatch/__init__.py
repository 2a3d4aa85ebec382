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
from .interpolation import interpolate_rope, revert_rope
from .models import from_pretrained
from .preallocated import PreallocatedCache
from .recall import Recall
from .temp_lora import TempLoraGenerator, temp_lora

__all__ = [
    "LambdaCache",
    "LambdaConfig",
    "LongpatchError",
    "PreallocatedCache",
    "Recall",
    "TempLoraGenerator",
    "convert_gpt_j_model",
    "convert_llama_model",
    "convert_model",
    "convert_mpt_model",
    "convert_yi_model",
    "from_pretrained",
    "interpolate_rope",
    "revert_model",
    "revert_rope",
    "temp_lora",
]
