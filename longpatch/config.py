"""Settings of Λ-attention, validated and frozen."""

from dataclasses import asdict, dataclass
from typing import Any

from longpatch_kernels import IMPLEMENTATIONS

from .errors import LongpatchError
from .recall.settings import Recall


@dataclass(frozen=True)
class LambdaConfig:
    """How a model attends after conversion (LM-Infinite, arXiv 2308.16137, section 3; the names are theirs).

    Attributes:
        local_branch: window in tokens; each token sees the last `local_branch` tokens, itself included.
        global_branch: number of sinks: first tokens of the text that every token sees.
        limit_distance: distance in tokens at which sinks outside the window appear; None means `local_branch`.
        slack: tokens the cache keeps beyond the window, so that as many can be taken back exactly (`cache.crop`).
        implementation: which kernel computes it: "auto" or a name in `longpatch_kernels.IMPLEMENTATIONS`.

        recall: brings tokens that left the window back (`longpatch.Recall`); None means that they are forgotten.

    Raises:
        LongpatchError: listing every setting that is out of range.
    """

    local_branch: int
    global_branch: int = 10
    limit_distance: int | None = None
    slack: int = 64
    implementation: str = "auto"
    recall: Recall | None = None

    def __post_init__(self):
        if isinstance(self.recall, dict):  # as saved
            object.__setattr__(self, "recall", Recall(**self.recall))
        if self.limit_distance is None:
            object.__setattr__(self, "limit_distance", self.local_branch)
        nearest = self.local_branch if isinstance(self.local_branch, int) else 1
        reasons = []
        for name, least in (("local_branch", 1), ("global_branch", 0), ("limit_distance", nearest), ("slack", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                bound = f"{least}, the local_branch" if name == "limit_distance" else str(least)
                reasons.append(f"{name}={value!r} must be an integer of at least {bound}")
        if not isinstance(self.recall, Recall | None):
            reasons.append(f"recall={self.recall!r} must be a Recall or None")
        elif self.recall is not None and not reasons and self.recall.block_tokens > self.local_branch:
            reasons.append(f"recall.block_tokens={self.recall.block_tokens} must be at most local_branch")
        if self.implementation not in ("auto", *IMPLEMENTATIONS):
            known = ", ".join(("auto", *IMPLEMENTATIONS))
            reasons.append(f"implementation={self.implementation!r} must be one of {known}")
        if reasons:
            raise LongpatchError("LambdaConfig", reasons)

    @property
    def distance(self) -> int:
        """Distance in tokens of every visible key outside the window."""
        return self.limit_distance or self.local_branch

    def to_marker(self) -> dict[str, Any]:
        """As plain data, for the model's config.json."""
        return asdict(self)
