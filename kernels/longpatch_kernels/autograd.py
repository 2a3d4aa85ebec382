"""One place in autograd for every implementation that computes its own gradients; autocast kept out both ways."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .inputs import LambdaInputs


def differentiable(inputs: LambdaInputs, forward: Callable, gradients: Callable) -> tuple[Tensor, Tensor]:
    """`forward(inputs) -> (out, lse)`, differentiable by `gradients(inputs, out, lse, grad_out, grad_lse)`."""
    if not wanted(inputs) and not _dual(inputs):
        return forward(inputs)  # without autograd's bookkeeping, which a decode step would notice
    # forward-mode derivatives are refused by name here instead of lost
    return _Attention.apply(*inputs.tensors, inputs, forward, gradients)


def wanted(x: LambdaInputs) -> bool:
    """Whether gradients may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x.tensors)


def _dual(x: LambdaInputs) -> bool:
    """Whether forward-mode derivatives are asked for."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # no dual level is open: nothing to ask six tensors for
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in x.tensors)


def autocasts(device: torch.device) -> bool:
    kind = device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def autocast(query: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of the autocast that is on, as PyTorch's own attention takes them."""
    dtype = torch.get_autocast_dtype(query.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (query, *others))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products that are meant to be in float32 stay so."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, query_far, key_far, value_far, inputs: LambdaInputs, function, gradients):
        out, lse = function(inputs)
        ctx.save_for_backward(query, key, value, query_far, key_far, value_far, out, lse)
        ctx.inputs, ctx.gradients = inputs.with_tensors(*[None] * 6), gradients  # autograd keeps the tensors
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *tensors, out, lse = ctx.saved_tensors
        with without_autocast(out.device):
            found = ctx.gradients(ctx.inputs.with_tensors(*tensors), out, lse, grad_out, grad_lse)
        return *found, None, None, None
