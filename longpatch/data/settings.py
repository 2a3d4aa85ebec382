"""What a model reads: the `data` section of a training configuration."""

from dataclasses import dataclass

from ..errors import at_least


@dataclass(frozen=True)
class DataSection:
    """What the model reads.

    Attributes:
        train, validation: files, folders or hub data sets, one or a list.
        length: tokens of a row at most; longer documents are cut.
        min_length: shorter rows are left out.
        pack: documents one after another, cut into rows of `length`; otherwise one document a row.
        bos: every row starts with BOS, wherever it was cut.
        streaming: read rows while training, in order and over again; nothing is kept.
        prompt_grad: false: what comes before the first trained token of a row is read without gradient.
    """

    train: str | list[str]
    length: int
    validation: str | list[str] | None = None
    min_length: int = 2
    pack: bool = True
    bos: bool = False
    streaming: bool = False
    prompt_grad: bool = True

    def reasons(self) -> list[str]:
        reasons = at_least(2, length=self.length, min_length=self.min_length)
        for name in ("train", "validation"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or (isinstance(value, list) and value)):
                reasons.append(f"{name}={value!r} must be a path or a list of paths")
        if not reasons and self.min_length > self.length:
            reasons.append(f"min_length={self.min_length} is more than length={self.length}")
        return reasons
