"""Λ-attention in PyTorch alone, linear in time and memory: which of three algorithms runs, and their gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import autograd
from ..inputs import Gradients, LambdaInputs
from . import causal, decode, products


def not_supported_reasons(inputs: LambdaInputs) -> list[str]:
    return []


def run(inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
    return differentiable(inputs, algorithm(inputs).forward, gradients)


def differentiable(inputs: LambdaInputs, forward: Callable, gradients: Callable) -> tuple[Tensor, Tensor]:
    """`forward(inputs) -> (out, lse)` with these gradients, which are those of the inputs `widened`."""
    out, lse = autograd.differentiable(widened(inputs), forward, gradients)
    return (out if out.dtype == inputs.query.dtype else out.to(inputs.query.dtype)), lse


def widened(x: LambdaInputs) -> LambdaInputs:
    """Half precision in float32 where gradients are wanted.

    Backward takes dO·O from the output: rounded to bfloat16 it would cost the gradients 2^-9 of that sum.
    """
    if x.query.dtype not in (torch.float16, torch.bfloat16) or not autograd.wanted(x):
        return x
    return x.with_tensors(*(None if t is None else t.float() for t in x.tensors))


def algorithm(x: LambdaInputs):
    """The rule; the first that suits.

    causal: on a CPU, no key has left a window yet: PyTorch's own attention.
    decode: on a CPU, a cache and one query, or few query rows a key head (`decode.MAX_ROWS`).
    products: everything.
    """
    if x.query.is_cpu and x.softcap is None and x.alibi_slopes is None and x.query_count > 0:
        if causal.suits(x):
            return causal
        if decode.suits(x):
            return decode
    return products


def explanation(x: LambdaInputs) -> str:
    """Which algorithm `x` gets."""
    return algorithm(x).__name__.rsplit(".", 1)[-1]


def gradients(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None) -> Gradients:
    """Gradients of the six tensors of `x`, from the forward's results and the gradients of these (None: not used)."""
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # PyTorch's kernel has no second derivative and takes no gradient of lse, which is often zeros that nobody asked for
    if algorithm(x) is causal and not torch.is_grad_enabled() and (grad_lse is None or not grad_lse.any()):
        computed = causal.backward(x, out, lse, grad_out)
    else:
        computed = products.backward(x, out, lse, grad_out, grad_lse)
    return tuple(g if g is None else g.to(x.query.dtype) for g in computed)
