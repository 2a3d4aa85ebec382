"""What `interpolate_rope` was asked for, validated, and the rope parameters that follow from it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LongpatchError, is_number

METHODS = ("none", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3")
SUPPORTED = f"method one of {', '.join(METHODS)} with a factor or a target_length, and/or theta"


@dataclass(frozen=True)
class Interpolation:
    """How positions are stretched.

    Attributes:
        method: one of `METHODS`; "none" leaves the frequencies as they are.
        factor: target length / original length.
        theta: base of the frequencies instead of the model's own, or None.
        target_length: tokens that the model is to read.
        original_length: tokens that it was trained on.
        long_factor: "longrope" only: divisor of each frequency past `original_length`, `[rotary_dim / 2]`.
    """

    method: str
    factor: float
    theta: float | None
    target_length: int
    original_length: int
    long_factor: tuple[float, ...] | None = None

    @classmethod
    def create(
        cls,
        method: str | None,
        factor: float | None,
        theta: float | None,
        target_length: int | None,
        original_length: int,
        long_factor: Sequence[float] | None = None,
    ) -> "Interpolation":
        """Fill in what follows; raises LongpatchError listing every argument that is wrong or missing."""
        reasons = []
        if method is None and theta is None:
            reasons.append("neither method nor theta is given")
        if method is not None and method not in METHODS:
            reasons.append(f"method={method!r} is unknown")
        for name, value, least in (("factor", factor, 1), ("theta", theta, 1)):
            if value is not None and not (is_number(value) and least <= value < math.inf):
                reasons.append(f"{name}={value!r} must be a number of at least {least}")
        for name, value in (("target_length", target_length), ("original_length", original_length)):
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
                reasons.append(f"{name}={value!r} must be a positive integer")
        if method is not None and factor is None and target_length is None:
            reasons.append(f"method={method!r} needs a factor or a target_length")
        if method is None and factor is not None:
            reasons.append(f"factor={factor!r} is given without a method")
        if long_factor is not None and method != "longrope":
            reasons.append(f"long_factor belongs to method='longrope', not {method!r}")
        if long_factor is not None and not (
            isinstance(long_factor, Sequence)
            and len(long_factor)
            and all(is_number(value) and 0 < value < math.inf for value in long_factor)
        ):
            reasons.append(f"long_factor={long_factor!r} must be a list of numbers above 0")
        if not reasons:
            if factor is None:
                factor = max(1, math.ceil((target_length or original_length) / original_length))
            if target_length is None:
                target_length = math.floor(factor * original_length)
            if target_length < original_length:
                reasons.append(f"target_length={target_length} is less than the original {original_length}")
            if method is not None and target_length > factor * original_length:
                reasons.append(
                    f"target_length={target_length} is more than factor={factor} times the original {original_length}"
                )
        if reasons:
            raise LongpatchError("interpolate_rope", reasons, SUPPORTED)
        assert factor is not None
        assert target_length is not None
        divisors = None if long_factor is None else tuple(float(value) for value in long_factor)
        return cls(method or "none", float(factor), theta, target_length, original_length, divisors)

    def rope_parameters(self, parameters: dict[str, Any], rotary_dim: int) -> dict[str, Any]:
        """`config.rope_parameters` of transformers for this interpolation of a model that has `parameters`.

        linear: arXiv 2306.15595. ntk: theta * factor ** (d / (d - 2)), so that the slowest frequency is divided by the
        factor and the fastest stays. dynamic: the same at each length. yarn: 2309.00071. longrope: 2402.13753, whose
        searched divisors default to those of ntk. llama3: Llama 3.1.
        """
        kept = dict(parameters)
        if self.theta is not None:
            kept["rope_theta"] = float(self.theta)
        theta = kept["rope_theta"]
        original = {"original_max_position_embeddings": self.original_length}
        match self.method:
            case "none":
                return kept
            case "ntk":
                return kept | {"rope_theta": theta * self.factor ** (rotary_dim / (rotary_dim - 2))}
            case "linear" | "dynamic":
                return kept | {"rope_type": self.method, "factor": self.factor}
            case "yarn":
                return kept | original | {"rope_type": "yarn", "factor": self.factor}
            case "longrope":
                pairs = rotary_dim // 2
                divisors = self.long_factor or [self.factor ** (i / max(1, pairs - 1)) for i in range(pairs)]
                if len(divisors) != pairs:
                    reason = f"long_factor has {len(divisors)} numbers, the model {pairs} frequencies"
                    raise LongpatchError("interpolate_rope", [reason])
                factors = {"short_factor": [1.0] * pairs, "long_factor": list(divisors), "factor": self.factor}
                return kept | original | {"rope_type": "longrope"} | factors
            case _:
                bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
                return kept | original | bands | {"rope_type": "llama3", "factor": self.factor}

    @property
    def max_positions(self) -> int:
        """`max_position_embeddings` afterwards; "dynamic" computes with the original one."""
        return self.original_length if self.method == "dynamic" else self.target_length

    def to_marker(self) -> dict[str, Any]:
        """As plain data: keyword arguments of `interpolate_rope`."""
        marker = asdict(self)
        marker["method"] = None if self.method == "none" and self.theta is not None else self.method
        if marker["method"] is None:
            marker["factor"] = None
        return {name: list(value) if isinstance(value, tuple) else value for name, value in marker.items()}
