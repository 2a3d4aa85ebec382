"""Tensors of one call as the named tuples that the Triton kernels take."""

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import FarSegment, LambdaInputs


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
    return Rows(tensor, *tensor.stride()[:3])


def dense_last(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def far(segment: FarSegment | None) -> Far:
    if segment is None:
        return NO_FAR
    positions, distance = segment.positions.contiguous(), segment.distance
    distance = None if distance is None else distance.to(torch.float32).contiguous()
    mask = None if segment.mask is None else rows(dense_last(segment.mask.view(torch.uint8)))
    return Far(
        rows(dense_last(segment.query)),
        rows(dense_last(segment.key)),
        rows(dense_last(segment.value)),
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
