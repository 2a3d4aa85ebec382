"""One place in autograd for every implementation that computes its own gradients; autocast kept out both ways."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .inputs import LambdaInputs


def differentiable(inputs: LambdaInputs, forward: Callable, gradients: Callable) -> tuple[Tensor, Tensor]:
    """`forward(inputs) -> (out, lse)`, differentiable by `gradients(inputs, out, lse, grad_out, grad_lse)`."""
    if not wanted(inputs):
        return forward(inputs)  # without autograd's bookkeeping, which a decode step would notice
    return _Attention.apply(*inputs.tensors, inputs, forward, gradients)


def wanted(x: LambdaInputs) -> bool:
    """Whether a gradient is asked for; forward-mode derivatives too, which autograd then refuses by name."""
    tensors = [t for t in x.tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products that are meant to be in float32 stay so."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


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
