"""Λ-attention by Triton kernels: what they can run, and their place in autograd. Imports Triton on first use."""

import importlib.util

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import autograd
from ..blocked import products
from ..inputs import Gradients, LambdaInputs

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


@torch.compiler.assume_constant_result
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def not_supported_reasons(inputs: LambdaInputs) -> list[str]:
    query = inputs.query
    reasons = []
    if not _installed():
        reasons.append("Triton is not installed (pip install triton)")
    if not _interpreted():
        if query.device.type != "cuda":
            reasons.append(f"the tensors are on {query.device}; Triton kernels need a CUDA device")
        elif _generation(query.device) < 8:
            reasons.append("the GPU is older than compute capability 8.0")
    elif query.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 products wrongly")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype {query.dtype}; supported are float16, bfloat16 and float32")
    if query.shape[-1] > LARGEST_HEAD:
        reasons.append(f"head size {query.shape[-1]} is above {LARGEST_HEAD}")
    if inputs.scale <= 0:
        reasons.append(f"scale {inputs.scale} is not positive")
    return reasons


def run(inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
    return autograd.differentiable(inputs, _attend, gradients)


def _attend(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d] and log-sum-exp [B, Hq, n] in float32."""
    from . import decode, forward

    if x.query.numel() == 0:
        return torch.empty_like(x.query), torch.empty(x.query.shape[:3], dtype=torch.float32, device=x.query.device)
    wide = _wide(x)
    out, lse = decode.decode(wide) if decode.packs(x) else forward.forward(wide.in_time_order())
    return out[..., : x.query.shape[-1]], lse


def gradients(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None) -> Gradients:
    """Gradients of the six tensors of `x`, from the forward's results and the gradients of these (None: not used)."""
    from . import backward

    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if torch.is_grad_enabled():  # for second derivatives, which the kernels do not have
        return products.backward(x, out, lse, grad_out, grad_lse)
    if out.numel() == 0:
        return tuple(t if t is None else torch.zeros_like(t) for t in x.tensors)
    wide = _wide(x).in_time_order()
    found = backward.backward(wide, _padded(out), lse, _padded(grad_out), grad_lse)
    return x.as_stored(tuple(g if g is None else g[..., : out.shape[-1]] for g in found))


def _wide(x: LambdaInputs) -> LambdaInputs:
    return x.with_tensors(*(t if t is None else _padded(t) for t in x.tensors))


def _padded(tensor: Tensor) -> Tensor:
    """Head sizes that 16 does not divide cost a copy: their rows cannot be read in whole vectors."""
    missing = -tensor.shape[-1] % 16
    return pad(tensor, (0, missing)) if missing else tensor
