"""The ways of reading that one evaluation compares, all on the same samples."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from ..config import LambdaConfig
from ..convert import convert_model, revert_model
from ..errors import LongpatchError

SYNTAX = "original, L/G, L/G@D, fresh:W, truncate:N, constant:TEXT"
_SPLIT = re.compile(r",(?=original\b|fresh:|truncate:|constant:|\d+/\d+)")


@dataclass(frozen=True)
class Arm:
    """One way of reading.

    Attributes:
        label: its name in records and tables.
        conversion: keyword arguments of `convert_model`; None leaves the model as it is.
        window: "fresh:W": the text is cut into windows of W tokens that know nothing of each other.
        keep: "truncate:N": of a longer prompt, N tokens stay; what is cut out is its middle.
        answer: "constant:TEXT": no model at all, always this answer; the floor of a metric.
    """

    label: str
    conversion: dict[str, Any] | None = None
    window: int | None = None
    keep: int | None = None
    answer: str | None = None

    @property
    def kind(self) -> str:
        return "lambda" if self.conversion is not None else self.label.partition(":")[0]

    @contextmanager
    def applied(self, model) -> Iterator[None]:
        """`model` as this arm wants it; afterwards it is unconverted. A constant answer needs none."""
        if self.answer is not None:
            yield
            return
        if self.conversion is not None:
            convert_model(model, **self.conversion)
        try:
            yield
        finally:
            revert_model(model)


def converted_arm(model, settings: dict[str, Any]) -> Arm:
    """The arm that converts with `settings`, labelled by what they come to on this `model`: "L/G", "L/G@D", ..."""
    converted = convert_model(model, **settings)
    config: LambdaConfig = getattr(converted, "longpatch").config  # noqa: B009
    revert_model(model)
    label = f"{config.local_branch}/{config.global_branch}"
    if config.distance != config.local_branch:
        label += f"@{config.distance}"
    named = ("local_branch", "global_branch", "limit_distance", "implementation", "slack")
    others = [field for field in fields(config) if field.name not in named]
    extra = [f"{f.name}={getattr(config, f.name)}" for f in others if getattr(config, f.name) != f.default]
    return Arm(" ".join([label, *extra]), dict(settings))


def parse_arms(text: str, settings: dict[str, Any] | None = None) -> list[Arm]:
    """Arms of a list such as `original,1024/10,truncate:2048,constant:yes`; `settings` hold for all conversions in it.

    Raises:
        LongpatchError: naming every part that is none.
    """
    arms, wrong = [], []
    for part in filter(None, _SPLIT.split(text.strip(","))):
        name, _, value = part.partition(":")
        lambda_arm = re.fullmatch(r"(\d+)/(\d+)(?:@(\d+))?", part)
        if part == "original":
            arms.append(Arm(part))
        elif lambda_arm:
            local_branch, global_branch, distance = (int(number) if number else None for number in lambda_arm.groups())
            own = {"local_branch": local_branch, "global_branch": global_branch, "limit_distance": distance}
            own["recall"] = False
            arms.append(Arm(part, {**(settings or {}), **own}))
        elif name == "constant":
            arms.append(Arm(part, answer=value))
        elif name in ("fresh", "truncate") and value.isdigit() and int(value) > 1:
            arms.append(Arm(part, window=int(value)) if name == "fresh" else Arm(part, keep=int(value)))
        else:
            wrong.append(f"{part!r} is not an arm")
    if wrong:
        raise LongpatchError("--baseline", wrong, SYNTAX)
    return arms


def check_arms(arms: list[Arm], kinds: tuple[str, ...], call: str) -> None:
    """Raises LongpatchError for arms that an evaluation has no use for, and for two of the same label."""
    reasons = [f"arm {arm.label!r}" for arm in arms if arm.kind not in kinds]
    labels = [arm.label for arm in arms]
    reasons += [f"arm {label!r} twice" for label in sorted(set(labels)) if labels.count(label) > 1]
    if reasons:
        names = {"lambda": "L/G", "fresh": "fresh:W", "truncate": "truncate:N", "constant": "constant:TEXT"}
        raise LongpatchError(call, reasons, ", ".join(names.get(kind, kind) for kind in kinds))
