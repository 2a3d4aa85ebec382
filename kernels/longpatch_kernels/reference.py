"""The definition of Λ-attention, dense and slow: the oracle that every other implementation is tested against."""

from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import LambdaInputs

Rotate = Callable[[Tensor, Tensor], Tensor]


def not_supported_reasons(inputs: LambdaInputs) -> list[str]:
    return []


def run(inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
    """One joint softmax over window keys (causal, distance < window) and far keys (distance >= window).

    Returns out [B, Hq, n, d] and the log-sum-exp of the visible scores [B, Hq, n]; a query that sees nothing gets 0
    and -inf. Memory grows with n * m.
    """
    x = inputs.in_time_order()
    device, slopes = x.query.device, x.alibi_slopes
    position = torch.arange(x.query_count, device=device)[:, None] + x.key_count - x.query_count
    index = torch.arange(x.key_count, device=device)
    distance = position - index  # [n, m]
    visible = (distance >= 0) & (distance < x.window)
    if x.first_valid is not None:
        visible = visible & (index >= x.first_valid[:, None, None, None])
    parts = [(x.query, x.key, x.value, distance, visible)]
    if x.far is not None:
        visible = position - x.far.positions[:, None, None, :] >= x.window
        if x.far.mask is not None:
            visible = visible & x.far.mask
        distance = x.far.distance[:, None, None, :] if x.far.distance is not None else distance
        parts.append((x.far.query, x.far.key, x.far.value, distance, visible))

    scores, values = [], []
    for query, key, value, distance, visible in parts:
        score = x.scale * query @ key.repeat_interleave(x.group, dim=1).mT
        if x.softcap is not None:
            score = x.softcap * torch.tanh(score / x.softcap)
        if slopes is not None:
            score = score - slopes[:, None, None].to(score.dtype) * distance
        scores.append(score.masked_fill(~visible, -torch.inf))
        values.append(value.repeat_interleave(x.group, dim=1))
    score = torch.cat(scores, dim=-1)
    lse = score.logsumexp(dim=-1)
    weight = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return weight @ torch.cat(values, dim=-2), lse


def ablated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sinks: int,
    distance: int,
    rotate: Rotate | None = None,
    alibi_slopes: Tensor | None = None,
    first_valid: Tensor | None = None,
    scale: float | None = None,
    capped: bool = True,
    middle: bool = False,
    triangle_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Λ-attention with its parts taken away one by one (LM-Infinite, arXiv 2308.16137, section 4), dense.

    Args:
        query: `[B, Hq, n, d]`, key and value: `[B, Hkv, m, d]`, before any rotation; query `i` stands at `m - n + i`.
        window, sinks, distance: L, G and D of the definition.
        rotate: `rotate(states [B, H, t, d], positions [t])` turns each token to its position; None turns nothing.
        alibi_slopes: `[Hq]`, subtracts slope x distance.
        first_valid: `[B]`, columns before it are left padding.
        capped: False shows what lies outside the window at its true distance instead of `distance`.
        middle: True shows every key, those between sinks and window too; with `capped`, the cap under full attention:
            a key at distance d appears at min(d, `distance`).
        triangle_offset: this times the logarithm of the number of middle keys that a query sees is subtracted from
            their scores.

    Returns:
        out `[B, Hq, n, d]` and lse `[B, Hq, n]`; 0 and -inf for a query that sees nothing.
    """
    group, m = query.shape[1] // key.shape[1], key.shape[2]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    index = torch.arange(m, device=query.device)
    position = index[m - query.shape[2] :]
    d = position[:, None] - index
    valid = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=query.device)
    if first_valid is not None:
        valid = first_valid[:, None, None, None]
    seen = (d >= 0) & (index >= valid)
    outside = d >= window
    is_middle = seen & outside & (index - valid >= sinks)
    seen = seen if middle else seen & ~is_middle

    beyond = d >= (distance if middle else window)

    turn = rotate or (lambda states, positions: states)
    score = turn(query, position) @ turn(key, index).mT
    if capped:
        far = turn(query, torch.full_like(position, distance)) @ key.mT
        score = torch.where(beyond, far, score)
    score = score * (query.shape[-1] ** -0.5 if scale is None else scale)
    if alibi_slopes is not None:
        shown = torch.where(beyond, distance, d) if capped else d
        score = score - alibi_slopes[:, None, None].to(score.dtype) * shown
    if triangle_offset:
        count = is_middle.sum(dim=-1, keepdim=True).clamp_min(1)
        score = torch.where(is_middle, score - triangle_offset * count.to(score.dtype).log(), score)
    score = score.masked_fill(~seen, -torch.inf)
    lse = score.logsumexp(dim=-1)
    weight = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return weight @ value, lse
