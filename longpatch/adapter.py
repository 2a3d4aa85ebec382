"""A trained adapter on disk: peft's files, and `longpatch.json`, which says what else the model needs."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open

from .convert import unwrap
from .errors import LongpatchError
from .interpolation import interpolate_rope

RECORD = "longpatch.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


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
        name = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    return name


def load_adapter(model: Any, folder: str | Path, trainable: bool = False) -> PeftModel:
    """Put an adapter, a folder or a hub name, on its base model, with positions interpolated as in its training.

    Raises:
        LongpatchError: where the weights are not safetensors, or where embeddings or norms that were trained in full
            are missing; the model is then as it was.
    """
    if Path(folder).is_dir():
        reasons = missing_weights(model, folder)
        if reasons:
            raise LongpatchError("load_adapter", reasons, f"a folder with adapter_config.json and {WEIGHTS}")
        rope = read_record(folder).get("rope")
        if rope:
            interpolate_rope(unwrap(model), **rope)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, use_safetensors=True)


def missing_weights(model: Any, folder: str | Path) -> list[str]:
    """What the adapter's files lack of what its configuration names."""
    folder = Path(folder)
    if not is_adapter(folder):
        return [f"{folder} holds no adapter_config.json"]
    if not (folder / WEIGHTS).is_file():
        return [f"{folder} holds no {WEIGHTS}"]
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        held = set(weights.keys())
    full = set(config.get("modules_to_save") or ())
    missing = [
        name
        for name, module in unwrap(model).named_modules()
        if name.rpartition(".")[2] in full and f"base_model.model.{name}.weight" not in held
        if getattr(module, "weight", None) is not None
    ]
    reasons = [f"{WEIGHTS} lacks the trained {', '.join(missing[:3])}" + (", ..." if len(missing) > 3 else "")]
    return reasons if missing else []
