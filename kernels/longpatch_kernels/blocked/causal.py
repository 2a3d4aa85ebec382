"""Ordinary causal attention, which Λ-attention is as long as no key has left the window: PyTorch's own CPU kernel."""

import torch
from torch import Tensor

from ..inputs import Gradients, LambdaInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def suits(x: LambdaInputs) -> bool:
    """No padding, every query's own key is the last that it sees, and the oldest is still in the last one's window.

    The kernel scales its causal mask as well: -inf times a scale that is not positive would show what it hides.
    """
    n = x.query_count
    return (
        n == x.key_count <= x.window
        and not x.wraps
        and x.scale > 0
        and x.query.dtype in DTYPES
        and (x.far is None or n - 1 - x.far.oldest < x.window)
        and (x.first_valid is None or not bool((x.first_valid > 0).any()))
    )


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d] and log-sum-exp [B, Hq, n] in float32."""
    x = x.dense()  # the kernel does not ask for the last stride
    out, lse = kernel(*_expanded(x), 0.0, True, scale=x.scale)
    return (out, lse) if x.group == 1 else (out.reshape(x.query.shape), lse.reshape(x.query.shape[:3]))


def backward(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients:
    """Gradients of the inputs, through `out` alone: the kernel's backward takes no gradient of the log-sum-exp."""
    x = x.dense()
    query, key, value = _expanded(x)
    grad_out = (grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()).reshape(query.shape)
    results = out.reshape(query.shape), lse.reshape(query.shape[:3])
    of_query, *of_shared = _kernel_backward(grad_out, query, key, value, *results, 0.0, True, scale=x.scale)
    # each key head collects from the query heads that share it
    of_keys = (t.reshape(*x.key.shape[:2], x.group, *x.key.shape[2:]).sum(dim=2) for t in of_shared)
    return of_query.reshape(x.query.shape), *of_keys, *(t if t is None else torch.zeros_like(t) for t in x.tensors[3:])


def _expanded(x: LambdaInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query [S, g, n, d] and keys and values [S, g, m, d], each key head seen g times without a copy."""
    if x.group == 1:
        return x.query, x.key, x.value
    query = x.query.reshape(-1, x.group, *x.query.shape[2:])
    key, value = (t.flatten(0, 1)[:, None].expand(-1, x.group, -1, -1) for t in (x.key, x.value))
    return query, key, value
