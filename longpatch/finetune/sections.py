"""The sections of a training configuration. Each says itself what is wrong with it: `reasons()`."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import TrainingArguments

from ..adapter import is_adapter
from ..errors import LongpatchError, at_least, is_number
from ..interpolation import Interpolation

QUANTIZATIONS = ("nf4", "int8", "none")
ATTENTIONS = ("full", "shifted", "lambda")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSection:
    """The model while it learns.

    Attributes:
        name: as MODEL on the command line.
        dtype: of the weights that are not quantised, and of computation.
        quantization: "nf4" (4 bits, double quantisation, QLoRA, arXiv 2305.14314), "int8" or "none".
        attention: "full"; "shifted": shifted sparse attention (LongLoRA, 2309.12307), while training only; "lambda".
        group: of "shifted": tokens of a group, or below 1 the share of the row that is one.
        local_branch, global_branch: of "lambda".
        loss_chunk: tokens whose logits exist at one time.
    """

    name: str
    dtype: str = "float32"
    quantization: str = "none"
    attention: str = "full"
    group: float = 0.25
    local_branch: int | None = None
    global_branch: int | None = None
    loss_chunk: int = 1024

    def reasons(self) -> list[str]:
        choices = (("dtype", DTYPES), ("quantization", QUANTIZATIONS), ("attention", ATTENTIONS))
        reasons = [
            f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}"
            for name, known in choices
            if getattr(self, name) not in known
        ]
        if not isinstance(self.name, str):
            reasons.append(f"name={self.name!r} must be a model's name")
        elif is_adapter(self.name):
            reasons.append(f"name={self.name!r} is an adapter; `longpatch merge` first makes a model of it")
        group = self.group
        if not is_number(group) or not (0 < group < 1 or (group >= 2 and group == int(group))):
            reasons.append(f"group={group!r} must be a share below 1 or a number of tokens of at least 2")
        return reasons + at_least(1, loss_chunk=self.loss_chunk)


@dataclass(frozen=True)
class RopeSection:
    """Keyword arguments of `interpolate_rope`; with none given, positions stay as they are."""

    method: str | None = None
    factor: float | None = None
    theta: float | None = None
    target_length: int | None = None
    original_length: int | None = None
    long_factor: list[float] | None = None

    def reasons(self) -> list[str]:
        """As `interpolate_rope` has them, as far as the model, which is not there yet, does not matter."""
        if not self.arguments():
            return []
        if self.method is None and self.theta is None:
            return ["method or theta is missing"]
        given = asdict(self)
        if self.original_length is None:  # the model's own, which is not known yet
            given["original_length"] = max(1, self.target_length) if isinstance(self.target_length, int) else 1
        try:
            Interpolation.create(**given)
        except LongpatchError as error:
            return error.reasons
        return []

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class LoraSection:
    """Which weights learn (LoRA, arXiv 2106.09685).

    Attributes:
        r, alpha, dropout: rank; the update is scaled by alpha / r; dropout before it.
        targets: "all-linear" or names of modules; lm_head is never one of "all-linear".
        embeddings, norms: learn the token embeddings and all norms in full; they are saved with the adapter.
    """

    r: int = 64
    alpha: int = 16
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    embeddings: bool = False
    norms: bool = False

    def reasons(self) -> list[str]:
        reasons = at_least(1, r=self.r, alpha=self.alpha)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            reasons.append(f"dropout={self.dropout!r} must be a share below 1")
        if not isinstance(self.targets, list) and self.targets != "all-linear":
            reasons.append(f"targets={self.targets!r} must be 'all-linear' or a list of module names")
        return reasons


def training_reasons(training: Any) -> list[str]:
    """What is wrong with keyword arguments of `TrainingArguments`, as far as their names tell."""
    if not isinstance(training, dict):
        return ["training is not a mapping"]
    known = {entry.name for entry in fields(TrainingArguments)} - {"output_dir", "remove_unused_columns"}
    return [f"training.{name} is not an argument of TrainingArguments here" for name in training if name not in known]
