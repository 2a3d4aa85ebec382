"""A trained adapter on disk: peft's files, and `longpatch.json`, which says what else the model needs."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from .convert import unwrap
from .errors import LongpatchError
from .interpolation import interpolate_rope

RECORD = "longpatch.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SUPPORTED = f"a folder or a hub name with {CONFIG} and {WEIGHTS}"


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def write_record(folder: str | Path, record: dict[str, Any]) -> None:
    (Path(folder) / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any]:
    """{base, rope, ...}; empty for an adapter that others made."""
    path = Path(folder) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def base_name(folder: str | Path) -> str:
    """MODEL that the adapter was trained on."""
    name = read_record(folder).get("base")
    if name is None:
        name = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return name


def adapter_folder(name: str | Path) -> Path | None:
    """The folder of an adapter, which is fetched where `name` is one of the hub; None for what is no adapter.

    Raises:
        LongpatchError: where the hub has it and it cannot be fetched.
    """
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path if is_adapter(path) else None
    return _fetched(str(name))


@cache  # asked for several times by one load, and slow to answer where there is no network
def _fetched(name: str) -> Path | None:
    try:
        if find_adapter_config_file(name) is None:
            return None
    except OSError:  # not even a name that the hub could have
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, RECORD]))
    except Exception as error:
        raise LongpatchError("load_adapter", [f"{name} cannot be fetched: {' '.join(str(error).split())}"]) from error


def load_adapter(model: Any, name: str | Path, trainable: bool = False) -> PeftModel:
    """Put an adapter, a folder or a hub name, on its base model, with positions interpolated as in its training.

    Raises:
        LongpatchError: where the weights are not safetensors, or where some that were trained are missing; the model
            is then as it was.
    """
    folder = adapter_folder(name)
    reasons = [f"{name} holds no {CONFIG}"] if folder is None else missing_weights(model, folder)
    if folder is None or reasons:
        raise LongpatchError("load_adapter", reasons, SUPPORTED)
    rope = read_record(folder).get("rope")
    if rope:
        interpolate_rope(unwrap(model), **rope)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, use_safetensors=True)


def missing_weights(model: Any, folder: Path) -> list[str]:
    """What the adapter's file lacks of what its configuration says was trained, in full or by LoRA."""
    if not (folder / WEIGHTS).is_file():
        return [f"{folder} holds no {WEIGHTS}"]
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        held = set(weights.keys())
    config = PeftConfig.from_pretrained(str(folder))
    lora = isinstance(config, LoraConfig) and config.target_modules != "all-linear"
    full = set(getattr(config, "modules_to_save", None) or ())
    missing = []
    for name, module in unwrap(model).named_modules():
        if getattr(module, "weight", None) is None:
            continue
        parts = []
        if name.rpartition(".")[2] in full:
            parts = ["weight"]
        elif lora and check_target_module_exists(config, name):
            embedding = isinstance(module, nn.Embedding)
            parts = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A.weight", "lora_B.weight"]
        missing += [f"{name}.{part}" for part in parts if f"base_model.model.{name}.{part}" not in held]
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return [f"{WEIGHTS} lacks the trained {shown}"] if missing else []
