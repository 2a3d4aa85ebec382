"""Tensors of one call as the named tuples that the Triton kernels take."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import FarSegment, LambdaInputs
from . import tuning


class Rows(NamedTuple):
    """A `[B, H, n, d]` tensor: strides of the first three axes, the last one is dense."""

    pointer: Tensor
    batch: int
    head: int
    row: int


class Far(NamedTuple):
    """The far segment; strides of 0 where one row of positions serves the whole batch."""

    query: Rows | None
    key: Rows | None
    value: Rows | None
    mask: Rows | None
    positions: Tensor | None
    positions_batch: int
    distances: Tensor | None
    distances_batch: int
    count: int


class Rule(NamedTuple):
    """How a product of query and key becomes a score."""

    scale: float
    softcap: float | None
    slopes: Tensor | None


NO_FAR = Far(None, None, None, None, None, 0, None, 0, 0)


def rows(tensor: Tensor) -> Rows:
    """Copies the tensor only where its last axis is strided."""
    dense = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return Rows(dense, *dense.stride()[:3])


def tiles(tensors: tuple[Tensor, ...], block: int, tma: bool) -> tuple[list[Any], bool]:
    """Tensors whose tiles of `block` rows a kernel walks, and whether it does so by Hopper's copy engine.

    That engine wants addresses and strides in multiples of 16 bytes; others are read through pointers.
    """
    if tma and all(_aligned(tensor) for tensor in tensors):
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = [1, 1, block, tensors[0].shape[-1]]
        return [TensorDescriptor(t, list(t.shape), _strides(t), shape) for t in tensors], True
    return [rows(tensor) for tensor in tensors], False


def _strides(tensor: Tensor) -> list[int]:
    """Strides, but 16 for axes of length 1, whose strides mean nothing and may be odd."""
    *outer, last = zip(tensor.stride(), tensor.shape, strict=True)
    return [16 if length == 1 else stride for stride, length in outer] + [last[0]]


def _aligned(tensor: Tensor) -> bool:
    dim, size = tensor.shape[-1], tensor.element_size()
    whole = dim == tuning.padded(dim) and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    return whole and all(stride > 0 and stride * size % 16 == 0 for stride in _strides(tensor)[:3])


def far(segment: FarSegment | None) -> Far:
    if segment is None:
        return NO_FAR
    positions, distance = segment.positions.contiguous(), segment.distance
    distance = None if distance is None else distance.to(torch.float32).contiguous()
    mask = None if segment.mask is None else rows(segment.mask.view(torch.uint8))
    return Far(
        rows(segment.query),
        rows(segment.key),
        rows(segment.value),
        mask,
        positions,
        positions.stride(0) if len(positions) > 1 else 0,
        distance,
        0 if distance is None or len(distance) == 1 else distance.stride(0),
        segment.key.shape[2],
    )


def rule(x: LambdaInputs) -> Rule:
    slopes = None if x.alibi_slopes is None else x.alibi_slopes.to(torch.float32).contiguous()
    return Rule(x.scale, x.softcap, slopes)
