"""What a model reads: the `data` section of a training configuration."""

from dataclasses import dataclass
from typing import Any

from ..errors import LongpatchError, at_least
from .mixture import parse_parts


@dataclass(frozen=True)
class DataSection:
    """What the model reads.

    Attributes:
        train, validation: files, folders or hub data sets: one, a list, or each with its weight, {path: 2.0} for two
            passes over it. PATH[5000] takes 5,000 of its rows at random.
        length: tokens of a row at most; longer texts are cut, longer conversations left out.
        data_root: folder that relative paths start from.
        template: of conversations: auto (the tokenizer's, else none), none, vicuna, llama-2, llama-3, mistral, a file.
        min_length: shorter rows are left out.
        pack: documents one after another, cut into rows of `length`; otherwise one document a row.
        bos: every row starts with BOS, wherever it was cut.
        seed: of what is chosen at random.
        cache: folder that keeps tokens for the next run with the same content and settings.
        workers: processes that tokenise.
        streaming: read rows while training, in order and over again; nothing is kept.
        prompt_grad: false: what comes before the first trained token of a row is read without gradient.
    """

    train: str | list[str] | dict[str, Any]
    length: int
    validation: str | list[str] | dict[str, Any] | None = None
    data_root: str | None = None
    template: str = "auto"
    min_length: int = 2
    pack: bool = True
    bos: bool = False
    seed: int = 0
    cache: str | None = None
    workers: int = 1
    streaming: bool = False
    prompt_grad: bool = True

    @property
    def room(self) -> int:
        """Tokens of one document that a row holds, beside the BOS that a row of its own starts with."""
        return self.length - (self.bos and not self.pack)

    def reasons(self) -> list[str]:
        reasons = at_least(2, length=self.length, min_length=self.min_length) + at_least(1, workers=self.workers)
        reasons += at_least(0, seed=self.seed)
        for name in ("pack", "bos", "streaming", "prompt_grad"):
            if not isinstance(getattr(self, name), bool):
                reasons.append(f"{name}={getattr(self, name)!r} must be true or false")
        for name in ("data_root", "cache", "template"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "template"):
                reasons.append(f"{name}={value!r} must be a string")
        for name in ("train", "validation"):
            value = getattr(self, name)
            paths = [value] if isinstance(value, str) else value
            if value is None and name == "validation":
                continue
            if not isinstance(paths, list | dict) or not paths or not all(isinstance(path, str) for path in paths):
                reasons.append(f"{name}={value!r} must be a path, a list of paths or {{path: weight}}")
                continue
            try:
                parse_parts(paths)
            except LongpatchError as error:
                reasons += [f"{name}: {reason}" for reason in error.reasons]
        if not reasons and self.min_length > self.length:
            reasons.append(f"min_length={self.min_length} is more than length={self.length}")
        return reasons
