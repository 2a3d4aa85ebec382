"""What a user may choose about recall, validated and frozen."""

from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import LongpatchError

STORAGES = ("device", "cpu", "disk")
SEGMENT_TOKENS = 4096
DEFAULT_DISTANCE = 64
INTEGERS = (("top_k", 1), ("from_layer", 0), ("to_layer", 1), ("distance", 0), ("queries", 1), ("block_tokens", 1))


@dataclass(frozen=True)
class Recall:
    """The `top_k` best tokens, or blocks of tokens, between sinks and window join the softmax.

    Token mode, `block_tokens=1`, is that of LM-Infinite (arXiv 2308.16137, section 3.3): each query head chooses for
    itself, by the very score that the token will have, once there are `top_k` tokens to choose from. Block mode chooses
    for all query heads that share a key head, by two representative keys a block.

    Attributes:
        top_k: tokens (token mode) or blocks (block mode) that each query recalls.
        from_layer, to_layer: first layer that recalls, and the one after the last; None means all further layers.
        distance: distance in tokens at which recalled tokens appear; None means 64, or half the window if that is less.
        queries: the last so many queries of each forward recall, one in LM-Infinite; None means every query.
        block_tokens: tokens of a block; a divisor of 4,096, and at most the window. Blocks count from the sinks.
        storage: where keys and values are kept: "device" (the model's), "cpu" (pinned where there is a GPU), "disk".
        folder: where the files of "disk" go, a folder that is there; None means the system's temporary one. They go
            with the cache.
        bits: 8 keeps keys and values in 8 bits with one scale for each token and head; None keeps them as they are.
        max_tokens: only the latest so many tokens that left the window can be recalled; older ones are forgotten.

    Raises:
        LongpatchError: listing every setting that is out of range.
    """

    top_k: int = 5
    from_layer: int = 0
    to_layer: int | None = None
    distance: int | None = None
    queries: int | None = 1
    block_tokens: int = 1
    storage: str = "device"
    folder: str | Path | None = None
    bits: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        reasons = []
        for name, least in (*INTEGERS, ("max_tokens", 1)):
            value = getattr(self, name)
            optional = name in ("to_layer", "distance", "queries", "max_tokens")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                reasons.append(f"{name}={value!r} must be an integer of at least {least}" + " or None" * optional)
        if isinstance(self.block_tokens, int) and self.block_tokens > 0 and SEGMENT_TOKENS % self.block_tokens:
            reasons.append(f"block_tokens={self.block_tokens} must divide {SEGMENT_TOKENS}")
        if not reasons and self.max_tokens is not None and self.max_tokens < self.top_k * self.block_tokens:
            least = self.top_k * self.block_tokens
            reasons.append(f"max_tokens={self.max_tokens} must be at least top_k * block_tokens = {least}")
        if self.storage not in STORAGES:
            reasons.append(f"storage={self.storage!r} must be one of {', '.join(STORAGES)}")
        if isinstance(self.folder, Path):
            object.__setattr__(self, "folder", str(self.folder))  # saved as JSON
        if not isinstance(self.folder, str | None):
            reasons.append(f"folder={self.folder!r} must be a path or None")
        if self.folder is not None and self.storage != "disk":
            reasons.append(f"folder={self.folder!r} goes with storage='disk' only")
        if self.bits not in (None, 8):
            reasons.append(f"bits={self.bits!r} must be 8 or None")
        if reasons:
            raise LongpatchError("Recall", reasons)

    def __str__(self) -> str:
        """What differs from the defaults, as `parse` reads it: `top_k=20,distance=64`, or `default`."""
        chosen = [(field.name, getattr(self, field.name)) for field in fields(self)]
        parts = [f"{name}={value}" for name, value in chosen if value != getattr(type(self), name)]
        return ",".join(parts) or "default"

    @classmethod
    def parse(cls, text: str) -> "Recall":
        """Settings written as `top_k=20,queries=None,storage=disk`; `default` changes nothing.

        Raises:
            LongpatchError: listing every setting that there is not, or that is out of range.
        """
        words = ("storage", "folder")
        names = [field.name for field in fields(cls)]
        chosen, wrong = {}, []
        for part in text.split(","):
            name, _, value = part.partition("=")
            if part == "default":
                continue
            if name not in names or not value:
                wrong.append(f"{part!r} is not a setting")
            elif value == "None":
                chosen[name] = None
            else:
                chosen[name] = value if name in words or not value.isdigit() else int(value)
        if wrong:
            raise LongpatchError("Recall.parse", wrong, ", ".join(f"{name}=..." for name in names))
        return cls(**chosen)

    def covers(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, recalls."""
        return layer >= self.from_layer and (self.to_layer is None or layer < self.to_layer)
