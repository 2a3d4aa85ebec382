"""The arguments of one Λ-attention call, checked once and handed whole to whichever implementation runs.

Nobody changes them. They are not frozen because small calls would notice: making a frozen one takes five times as long.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# of query, key, value, query_far, key_far, value_far; the last three None where there is no far segment
Gradients = tuple[Tensor | None, ...]


@dataclass
class FarSegment:
    """Keys outside the window (sinks, recalled tokens), scored by a query of their own."""

    query: Tensor  # [B, Hq, n, d]
    key: Tensor  # [B, Hkv, f, d]
    value: Tensor  # [B, Hkv, f, d]
    given_positions: Tensor | None  # [1 or B, f]; None: 0..f-1
    mask: Tensor | None  # [B, Hq, n, f]
    distance: Tensor | None  # [1 or B, f], for ALiBi

    @property
    def positions(self) -> Tensor:
        """[1 or B, f]"""
        if self.given_positions is None:
            return torch.arange(self.key.shape[2], device=self.key.device)[None]
        return self.given_positions

    @property
    def oldest(self) -> int:
        """The least of the positions."""
        return 0 if self.given_positions is None else int(self.given_positions.min())


@dataclass
class LambdaInputs:
    """Shapes: B rows, Hq query heads, Hkv key heads, n queries, m window keys, f far keys, d head size.

    Positions count from the oldest window key: window key `j` stands at position `j`, query `i` at `m - n + i`.
    """

    query: Tensor  # [B, Hq, n, d]
    key: Tensor  # [B, Hkv, m, d]
    value: Tensor  # [B, Hkv, m, d]
    window: int
    far: FarSegment | None
    first_valid: Tensor | None  # [B]
    ring_start: int | Tensor
    scale: float
    alibi_slopes: Tensor | None  # [Hq]
    softcap: float | None

    @property
    def query_count(self) -> int:
        return self.query.shape[2]

    @property
    def key_count(self) -> int:
        return self.key.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors that gradients flow to; None where there is no far segment."""
        far = (None, None, None) if self.far is None else (self.far.query, self.far.key, self.far.value)
        return self.query, self.key, self.value, *far

    @property
    def wraps(self) -> bool:
        """Whether the keys may begin elsewhere than at index 0; a tensor is not looked into."""
        return isinstance(self.ring_start, Tensor) or self.ring_start != 0

    def time_index(self, index: Tensor) -> Tensor:
        """Positions of the keys stored at `index`."""
        return (index - self.ring_start) % self.key_count if self.wraps else index

    def dense(self) -> "LambdaInputs":
        """The same call with every row of head_dim numbers in one piece."""
        tensors = self.tensors
        for t in tensors:
            if t is not None and t.stride(-1) != 1:
                return self.with_tensors(*(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors))
        return self

    def with_tensors(self, query, key, value, query_far, key_far, value_far) -> "LambdaInputs":
        far = self.far and replace(self.far, query=query_far, key=key_far, value=value_far)
        return replace(self, query=query, key=key, value=value, far=far)

    def in_time_order(self) -> "LambdaInputs":
        """The same call with the ring unrolled, at the price of a copy of the keys and values."""
        if not self.wraps:
            return self
        start = int(self.ring_start)
        key, value = (t.roll(-start, dims=2) for t in (self.key, self.value))
        return replace(self, key=key, value=value, ring_start=0)

    def as_stored(self, gradients: Gradients) -> Gradients:
        """Gradients of `in_time_order()`'s tensors as those of this call's."""
        if not self.wraps:
            return gradients
        query, key, value, *far = gradients
        key, value = (None if grad is None else grad.roll(int(self.ring_start), dims=2) for grad in (key, value))
        return query, key, value, *far


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scores, sums and log-sum-exp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    query_far: Tensor | None = None,
    key_far: Tensor | None = None,
    value_far: Tensor | None = None,
    far_positions: Tensor | None = None,
    far_mask: Tensor | None = None,
    first_valid: Tensor | None = None,
    ring_start: int | Tensor = 0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    far_distance: float | Tensor | None = None,
    softcap: float | None = None,
) -> LambdaInputs:
    """Fill in defaults. Raises ValueError that lists everything that is wrong with the arguments."""
    reasons = []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            reasons.append(f"{name} has shape {tuple(tensor.shape)}, expected [batch, heads, tokens, head_dim]")
    if reasons:
        raise _error(reasons)
    batch, query_heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]

    def expect(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]):
        if tensor is not None and tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            reasons.append(f"{name} has shape {list(tensor.shape)}, expected {expected}")

    for size, what in ((batch, "rows"), (query_heads * key_heads, "heads"), (head_dim, "numbers a head")):
        if size == 0:
            reasons.append(f"no {what}: query has shape {list(query.shape)}, key {list(key.shape)}")
    tensors = [t for t in (query, key, value, query_far, key_far, value_far) if t is not None]
    dtypes = [t.dtype for t in tensors]
    if dtypes.count(dtypes[0]) < len(dtypes):
        reasons.append(f"queries, keys and values differ in dtype: {', '.join(map(str, dtypes))}")
    if not all(t.is_cpu for t in tensors):  # asking for devices takes longer
        devices = [t.device for t in tensors]
        if devices.count(devices[0]) < len(devices):
            reasons.append(f"queries, keys and values differ in device: {', '.join(map(str, devices))}")
    expect("key", key, (batch, key_heads, keys, head_dim))
    expect("value", value, (batch, key_heads, keys, head_dim))
    if key_heads and query_heads % key_heads:
        reasons.append(f"query has {query_heads} heads, not a multiple of the {key_heads} key heads")
    if keys < queries:
        reasons.append(f"{queries} queries but {keys} keys: every query's own key must be among the keys")
    if not isinstance(window, int | torch.SymInt):
        reasons.append(f"window is {window}, expected a whole number")
    elif window < 1:
        reasons.append(f"window is {window}, must be at least 1")
    if isinstance(ring_start, Tensor):
        if ring_start.numel() != 1 or ring_start.is_floating_point():
            reasons.append(f"ring_start is a {ring_start.dtype} tensor {list(ring_start.shape)}, expected one integer")
    elif keys and not 0 <= ring_start < keys:
        reasons.append(f"ring_start is {ring_start}, must lie in [0, {keys})")
    if query_far is not None and key_far is not None and value_far is not None:
        count = key_far.shape[2]
        expect("query_far", query_far, (batch, query_heads, queries, head_dim))
        expect("key_far", key_far, (batch, key_heads, count, head_dim))
        expect("value_far", value_far, (batch, key_heads, count, head_dim))
        expect("far_mask", far_mask, (batch, query_heads, queries, count))
        if far_mask is not None and far_mask.dtype != torch.bool:
            reasons.append(f"far_mask is {far_mask.dtype}, expected torch.bool")
        per_key = ((count,), (1, count), (batch, count))
        expect("far_positions", far_positions, *per_key)
        if alibi_slopes is not None and far_distance is not None:
            expect("far_distance", torch.as_tensor(far_distance), (), *per_key)
    elif query_far is not None or key_far is not None or value_far is not None:
        reasons.append("query_far, key_far and value_far come together or not at all")
    else:
        options = {"far_positions": far_positions, "far_mask": far_mask, "far_distance": far_distance}
        reasons += [f"{name} without far keys" for name, option in options.items() if option is not None]
    expect("first_valid", first_valid, (batch,))
    expect("alibi_slopes", alibi_slopes, (query_heads,))
    if softcap is not None and softcap <= 0:
        reasons.append(f"softcap is {softcap}, must be positive")
    if reasons:
        raise _error(reasons)
    return filled_in(
        query, key, value, window, query_far, key_far, value_far, far_positions, far_mask, first_valid, ring_start,
        scale, alibi_slopes, far_distance, softcap,
    )  # fmt: skip


def filled_in(
    query, key, value, window, query_far, key_far, value_far, far_positions, far_mask, first_valid, ring_start, scale,
    alibi_slopes, far_distance, softcap,
) -> LambdaInputs:  # fmt: skip
    """What `checked_inputs` returns, of arguments that are known to be right."""
    far = None
    if key_far is not None and key_far.shape[2]:
        count = key_far.shape[2]
        positions = far_positions if far_positions is None else far_positions.reshape(-1, count)
        distance = None
        if alibi_slopes is not None:
            distance = torch.as_tensor(window if far_distance is None else far_distance, device=query.device)
            distance = (distance.expand(count) if distance.ndim == 0 else distance).reshape(-1, count)
        far = FarSegment(query_far, key_far, value_far, positions, far_mask, distance)
    return LambdaInputs(
        query=query,
        key=key,
        value=value,
        window=window,
        far=far,
        first_valid=None if first_valid is None else first_valid.contiguous(),
        ring_start=ring_start,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
    )


def _error(reasons: list[str]) -> ValueError:
    return ValueError("lambda_attention: " + "; ".join(reasons))
