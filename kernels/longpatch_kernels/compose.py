"""Λ-attention from another library's windowed attention and a small dense far part, merged exactly by log-sum-exp.

The library computes the window part; over disjoint keys two results merge by their log-sum-exp. Backward must hand each
part the MERGED out and log-sum-exp: its weights are then the joint softmax's. Merging by autograd instead is silently
wrong wherever a library's backward ignores the gradient of its log-sum-exp.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import autograd
from .blocked import products
from .inputs import FarSegment, Gradients, LambdaInputs


class WindowPart(Protocol):
    """Causal attention to the last `window` keys, tensors laid out as in LambdaInputs, key heads not repeated."""

    def forward(self, x: LambdaInputs) -> tuple[Tensor, Tensor]:
        """out [B, Hq, n, d] and lse [B, Hq, n]."""
        ...

    def backward(self, x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key, value from weights exp(score - lse) and delta = <out, grad_out>."""
        ...


def attend(x: LambdaInputs, part: WindowPart) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, n, d] and lse [B, Hq, n], differentiable in all six tensors."""
    return autograd.differentiable(x, partial(_forward, part), partial(_gradients, part))


def _forward(part: WindowPart, x: LambdaInputs) -> tuple[Tensor, Tensor]:
    out, lse = part.forward(x)
    lse = lse.float()
    return (out, lse) if x.far is None else merge(out, lse, *far_forward(x, x.far))


def _gradients(
    part: WindowPart, x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None
) -> Gradients:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if torch.is_grad_enabled():  # for second derivatives, which the libraries do not have
        return products.backward(x, out, lse, grad_out, grad_lse)
    window = window_backward(x, part, out, lse, grad_out, grad_lse)
    if x.far is None:
        return *window, None, None, None
    delta = (out.float() * grad_out.float()).sum(dim=-1)
    return *window, *far_backward(x, x.far, lse, delta if grad_lse is None else delta - grad_lse, grad_out)


def merge(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over disjoint keys as one; a query that sees nothing in either gets 0 and -inf."""
    blind = lse.isneginf() & far_lse.isneginf()  # logaddexp would have no gradient there, not even 0
    total = torch.logaddexp(lse.masked_fill(blind, 0.0), far_lse).masked_fill(blind, -torch.inf)
    shift = total.masked_fill(total.isneginf(), 0.0)
    # A part that saw nothing may carry anything, NaN included.
    out = out.masked_fill(lse.isneginf()[..., None], 0.0)
    weights, far_weights = (lse - shift).exp()[..., None], (far_lse - shift).exp()[..., None]
    return (out * weights + far_out * far_weights).to(out.dtype), total


def far_scores(x: LambdaInputs, far: FarSegment) -> tuple[Tensor, Tensor]:
    """Scores [B, Hkv, group, n, f], -inf where unseen, and the derivative of the soft-cap."""
    query = _grouped(far.query, x)
    scores = (query * x.scale) @ far.key.float()[:, :, None].mT
    slope = torch.ones((), device=scores.device)
    if x.softcap is not None:
        capped = torch.tanh(scores / x.softcap)
        scores, slope = x.softcap * capped, 1 - capped.square()
    if x.alibi_slopes is not None and far.distance is not None:
        scores = scores - x.alibi_slopes.float().view(1, -1, x.group, 1, 1) * far.distance[:, None, None, None]
    position = torch.arange(x.query_count, device=scores.device)[:, None] + x.key_count - x.query_count
    hidden = position - far.positions[:, None, None, None, :] < x.window
    if far.mask is not None:
        hidden = hidden | ~far.mask.unflatten(1, (-1, x.group))
    return scores.masked_fill(hidden, -torch.inf), slope


def far_forward(x: LambdaInputs, far: FarSegment) -> tuple[Tensor, Tensor]:
    scores, _ = far_scores(x, far)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return (weights @ far.value.float()[:, :, None]).flatten(1, 2), lse.flatten(1, 2)


def far_backward(
    x: LambdaInputs, far: FarSegment, lse: Tensor, delta: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query_far, key_far, value_far; lse is the joint one, delta = <out, grad_out> - grad_lse."""
    scores, slope = far_scores(x, far)
    weights = (scores - _grouped(lse.masked_fill(lse.isneginf(), torch.inf), x)[..., None]).exp()
    upstream = _grouped(grad_out, x)
    grad_scores = weights * (upstream @ far.value.float()[:, :, None].mT - _grouped(delta, x)[..., None])
    grad_scores = grad_scores * slope * x.scale
    grad_query = (grad_scores @ far.key.float()[:, :, None]).flatten(1, 2)
    grad_key = (grad_scores.mT @ _grouped(far.query, x)).sum(dim=2)
    grad_value = (weights.mT @ upstream).sum(dim=2)
    return grad_query.to(far.query.dtype), grad_key.to(far.key.dtype), grad_value.to(far.value.dtype)


def _grouped(tensor: Tensor, x: LambdaInputs) -> Tensor:
    """`[B, Hq, ...]` as float32 `[B, Hkv, group, ...]`."""
    return tensor.float().unflatten(1, (-1, x.group))


def window_backward(
    x: LambdaInputs, part: WindowPart, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's raw backward, given the joint out and lse.

    It computes delta = <out, grad_out> by itself, from which grad_lse must be subtracted: eight more columns, zero in
    query, key and value, hold 1 in out and -grad_lse in grad_out, and change nothing else.
    """
    lse = lse.masked_fill(lse.isneginf(), torch.inf)  # such rows have no weights
    if grad_lse is None:
        return part.backward(x, out, lse, grad_out)
    dim = out.shape[-1]
    wide = x.with_tensors(*(pad(t, (0, 8)) for t in (x.query, x.key, x.value)), *[None] * 3)
    out, grad_out = pad(out, (0, 8)), pad(grad_out, (0, 8))
    out[..., dim] = 1
    grad_out[..., dim] = -grad_lse.to(grad_out.dtype)
    query, key, value = (grad[..., :dim] for grad in part.backward(wide, out, lse, grad_out))
    return query, key, value
