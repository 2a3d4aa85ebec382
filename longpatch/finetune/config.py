"""What one training run is: a YAML file of five sections, checked before anything is loaded."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..data.settings import DataSection
from ..errors import LongpatchError
from .sections import LoraSection, ModelSection, RopeSection, training_reasons

CALL = "train"


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: which model, how it is held in memory, how it attends while it learns.
        data: what it reads, in which rows.
        rope: how its positions are stretched: keyword arguments of `interpolate_rope`; empty: not at all.
        lora: which weights learn.
        training: keyword arguments of `transformers.TrainingArguments`, handed on as they are.
        output: folder of the checkpoints and, at the end, the adapter.
    """

    model: ModelSection
    data: DataSection
    output: str
    rope: RopeSection = field(default_factory=RopeSection)
    lora: LoraSection = field(default_factory=LoraSection)
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> "TrainConfig":
        """From nested plain data.

        Raises:
            LongpatchError: listing every unknown, missing and wrong entry by its path, as in "lora.r".
        """
        if not isinstance(values, dict):
            raise LongpatchError(CALL, ["the configuration is not a mapping of sections"])
        reasons: list[str] = []
        sections = {"model": ModelSection, "data": DataSection, "rope": RopeSection, "lora": LoraSection}
        known = {entry.name for entry in fields(cls)}
        reasons += [f"{name} is unknown" for name in values if name not in known]
        built: dict[str, Any] = {}
        for name, section in sections.items():
            built[name] = _section(name, section, values.get(name) or {}, reasons)
        output = values.get("output")
        if not isinstance(output, str | Path):
            reasons.append(f"output={output!r} must be a folder")
        training = values.get("training") or {}
        if isinstance(training, dict):
            training = {name: _as_meant(name, value) for name, value in training.items()}
        reasons += training_reasons(training)
        if not reasons:
            reasons += _contradictions(**built, training=training)
        if reasons:
            raise LongpatchError(CALL, reasons, f"the sections {', '.join(sorted(known))}; see docs/extending.md")
        return cls(**built, training=training, output=str(output))


def read_config(path: Path | str, changes: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML file, with `changes` such as "data.length=2048" made to it first.

    Raises:
        LongpatchError: naming the file, and everything in it that is wrong.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        for change in changes:
            _change(values, change)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LongpatchError(CALL, [f"{path} cannot be read: {' '.join(str(error).split())}"]) from error
    return TrainConfig.from_dict(values)


def _change(values: Any, change: str) -> None:
    name, equals, value = change.partition("=")
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {}) if isinstance(values, dict) else None
    if not equals or not isinstance(values, dict):
        raise LongpatchError(CALL, [f"{change!r} changes nothing"], "SECTION.NAME=VALUE, as in data.length=2048")
    values[last] = yaml.safe_load(value)


def _as_meant(name: str, value: Any) -> Any:
    """YAML takes 1e-3, without a dot, for text, and `no` for false."""
    if value is False and name.endswith("_strategy"):
        return "no"
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _section(name: str, section: type, values: Any, reasons: list[str]) -> Any:
    if not isinstance(values, dict):
        reasons.append(f"{name} is not a mapping")
        return None
    known = {entry.name for entry in fields(section)}
    unknown = [key for key in values if key not in known]
    reasons += [f"{name}.{key} is unknown (known: {', '.join(sorted(known))})" for key in unknown]
    try:
        built = section(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        reasons.append(f"{name}: {str(error).partition(') ')[2] or error}")
        return None
    reasons += [f"{name}.{reason}" for reason in built.reasons()]
    return built


def _contradictions(
    model: ModelSection, data: DataSection, rope: RopeSection, lora: LoraSection, training: dict[str, Any]
) -> list[str]:
    reasons = []
    half = model.dtype != "float32"
    if half and (lora.embeddings or lora.norms) and not (training.get("bf16") or training.get("fp16")):
        reasons.append(
            f"lora.embeddings and lora.norms learn in float32, beside model.dtype={model.dtype!r} "
            "only with training.bf16 or training.fp16"
        )
    if not data.prompt_grad:
        if training.get("gradient_checkpointing"):
            reasons.append("data.prompt_grad=false caches the prompt, which gradient_checkpointing forbids")
        if model.attention == "shifted":
            reasons.append("data.prompt_grad=false leaves no long stretch for model.attention='shifted'")
        if rope.method in ("dynamic", "longrope") and model.attention != "lambda":
            reasons.append(f"data.prompt_grad=false caches keys, which rope.method={rope.method!r} outdates")
        if data.pack:
            reasons.append("data.prompt_grad=false needs rows of their own: data.pack=false")
        for name, default in (("per_device_train_batch_size", 8), ("per_device_eval_batch_size", 1)):
            if training.get(name, default) != 1:
                reasons.append(f"data.prompt_grad=false needs training.{name}=1")
    measured = training.get("eval_strategy", "no")
    if data.validation is not None and measured == "no":
        reasons.append("data.validation is read where training.eval_strategy says when: steps or epoch")
    if data.validation is None and measured != "no":
        reasons.append(f"training.eval_strategy={measured!r} needs data.validation")
    if data.streaming and training.get("max_steps", -1) <= 0:
        reasons.append("data.streaming=true needs training.max_steps")
    if data.streaming and training.get("dataloader_num_workers", 0):
        reasons.append("data.streaming=true is read by one process: no training.dataloader_num_workers (data.workers)")
    if data.streaming and training.get("train_sampling_strategy", "random") != "random":
        reasons.append("data.streaming=true reads rows in order: no training.train_sampling_strategy")
    return reasons
