"""The definition of Λ-attention, dense and slow: the oracle that every other implementation is tested against."""

import torch
from torch import Tensor

from .inputs import LambdaInputs


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
