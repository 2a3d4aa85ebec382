"""Λ-attention by Triton kernels: what they can run, and their place in autograd. Imports Triton on first use."""

import importlib.util
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..inputs import LambdaInputs

LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    if not _installed():
        return False
    from triton import knobs

    return knobs.runtime.interpret


def not_supported_reasons(inputs: LambdaInputs) -> list[str]:
    query = inputs.query
    tensors = [tensor for tensor in inputs.tensors if tensor is not None]
    reasons = []
    if not _installed():
        reasons.append("Triton is not installed (pip install triton)")
    if not _interpreted():
        if query.device.type != "cuda":
            reasons.append(f"the tensors are on {query.device}; Triton kernels need a CUDA device")
        elif torch.cuda.get_device_capability(query.device) < (8, 0):
            reasons.append("the GPU is older than compute capability 8.0")
    elif query.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 products wrongly")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype {query.dtype}; supported are float16, bfloat16 and float32")
    if len({tensor.dtype for tensor in tensors}) > 1:
        reasons.append("query, key and value differ in dtype: " + ", ".join(str(tensor.dtype) for tensor in tensors))
    if query.shape[-1] > LARGEST_HEAD:
        reasons.append(f"head size {query.shape[-1]} is above {LARGEST_HEAD}")
    if inputs.scale <= 0:
        reasons.append(f"scale {inputs.scale} is not positive")
    return reasons


def run(inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Head sizes that 16 does not divide cost a padded copy: their rows cannot be read in whole vectors."""
    from . import decode

    x = inputs
    if x.far is not None and x.far.key.shape[2] == 0:
        x = replace(x, far=None)
    dim = x.query.shape[-1]
    if dim % 16:
        x = x.with_tensors(*(None if t is None else pad(t, (0, -dim % 16)) for t in x.tensors))
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x.tensors)
    if wants_gradient or not decode.packs(x):
        x = x.in_time_order()
    out, lse = _TritonAttention.apply(*x.tensors, x)
    return out[..., :dim], lse


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, query_far, key_far, value_far, inputs: LambdaInputs):
        from . import decode, forward

        if query.numel() == 0:
            out, lse = torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        elif decode.packs(inputs):
            out, lse = decode.decode(inputs)
        else:
            out, lse = forward.forward(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, query_far, key_far, value_far, out, lse)
        ctx.inputs = inputs.with_tensors(*[None] * 6)  # autograd keeps the tensors
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        from . import backward

        *tensors, out, lse = ctx.saved_tensors
        x = ctx.inputs.with_tensors(*tensors)
        if out.numel() == 0:
            return *(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors), None
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return *backward.backward(x, out, lse, grad_out, grad_lse), None
