"""Recalled tokens join the softmax: two partial results over disjoint keys merge exactly by their log-sum-exp."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longpatch_kernels.compose import merge

from ..rope import rotate
from . import search
from .memory import Memory

if TYPE_CHECKING:
    from ..layers import LayerSettings
    from ..step import Step


def join(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    memory: Memory,
    step: "Step",
    settings: "LayerSettings",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`out` [B, Hq, n, d] and `lse` [B, Hq, n] of Λ-attention, with what the last queries recall.

    `query` [B, Hq, n, d] is rotated as the model did; `scale`, `softcap` and `alibi_slopes` as for `lambda_attention`.
    """
    lookup = step.lookup
    assert lookup is not None
    memory.found = None
    if not lookup.possible:
        return out, lse
    rest = out.shape[2] - lookup.first.shape[1]
    asking = query[:, :, rest:]
    found = search.attend(
        memory,
        rotate(asking, lookup.query_phase) if settings.rotated else asking,
        lookup,
        query.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        None if alibi_slopes is None else -alibi_slopes * lookup.distance,
    )
    merged = merge(out[:, :, rest:], lse[:, :, rest:], *found)
    if rest == 0:
        return merged
    joined, joined_lse = (torch.cat((a[:, :, :rest], b), dim=2) for a, b in zip((out, lse), merged, strict=True))
    return joined, joined_lse


def passing_memory(key: Tensor, value: Tensor, step: "Step", settings: "LayerSettings") -> Memory:
    """A memory of one forward without cache, whose keys and values [B, Hkv, n, d] are all there is."""
    recall, lookup = settings.config.recall, step.lookup
    assert recall is not None
    assert lookup is not None
    memory = Memory(recall, settings.config.local_branch)
    key = rotate(key.detach(), lookup.key_phase) if settings.rotated else key.detach()
    memory.append(key, value.detach(), lookup.starts)
    return memory
