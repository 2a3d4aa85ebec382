"""Λ-attention on a CPU by a C++ kernel of our own, compiled on first use; gradients are `blocked`'s."""

import ctypes
import math

import torch
from torch import Tensor

from .. import blocked
from ..blocked import decode, gradients, widened
from ..inputs import LambdaInputs
from .build import library

__all__ = ["gradients", "not_supported_reasons", "run", "widened", "worthwhile"]

SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LEAST_PAIRS = 2**10  # of query and key: compiling takes seconds, once a machine; smaller calls are not worth it


def not_supported_reasons(inputs: LambdaInputs) -> list[str]:
    reasons = []
    if inputs.query.device.type != "cpu":
        reasons.append(f"the tensors are on {inputs.query.device}")
    if inputs.query.dtype not in SUFFIX:
        reasons.append(f"dtype {inputs.query.dtype}; supported are float32 and bfloat16")
    if inputs.query.shape[-1] % 16:
        reasons.append(f"head size {inputs.query.shape[-1]} is not a multiple of 16")
    for name in ("alibi_slopes", "softcap"):
        if getattr(inputs, name) is not None:
            reasons.append(f"{name}: not in this kernel")
    if inputs.far is not None and inputs.far.mask is not None:
        reasons.append("far_mask: not in this kernel")
    if not reasons and (problem := _problem()):
        reasons.append(problem)
    return reasons


@torch.compiler.assume_constant_result
def _problem() -> str | None:
    found = library()
    return found if isinstance(found, str) else None


def worthwhile(x: LambdaInputs) -> bool:
    """When "auto" prefers this to `blocked`: decode steps and windows that fill up, from LEAST_PAIRS on."""
    pairs = x.query.shape[0] * x.query.shape[1] * x.query_count * min(x.key_count, x.window)
    return pairs >= LEAST_PAIRS and (decode.suits(x) or x.key_count > x.window)


def run(inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
    return blocked.differentiable(inputs, forward)


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((axis, ctypes.c_int64) for axis in ("batch", "head", "row")))


class _Call(ctypes.Structure):
    TENSORS = ("query", "key", "value", "far_query", "far_key", "far_value", "out")
    POINTERS = ("lse", "far_positions")
    SIZES = ("batch", "heads", "key_heads", "queries", "keys", "dim", "window", "far_count", "ring_start", "threads")
    _fields_ = (
        *((name, _Rows) for name in TENSORS),
        ("lse", ctypes.c_void_p),
        ("far_positions", ctypes.c_void_p),
        ("far_positions_batch", ctypes.c_int64),
        ("first_valid", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_float),
    )


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d], in memory [B, n, Hq, d], and log-sum-exp [B, Hq, n] in float32."""
    few = decode.suits(x)
    x = x if few else x.in_time_order()
    batch, heads, queries, dim = x.query.shape
    out = x.query.new_empty(batch, queries, heads, dim).transpose(1, 2)
    lse = out.new_empty(batch, heads, queries, dtype=torch.float32)
    kept = []  # whatever the kernel reads, until it has

    def rows(tensor: Tensor) -> _Rows:
        kept.append(tensor if tensor.stride(-1) == 1 else tensor.contiguous())
        return _Rows(kept[-1].data_ptr(), *kept[-1].stride()[:3])

    def integers(tensor: Tensor) -> int:
        kept.append(tensor.to(torch.int64).contiguous())
        return kept[-1].data_ptr()

    call = _Call(
        query=rows(x.query), key=rows(x.key), value=rows(x.value), out=rows(out), lse=lse.data_ptr(),
        batch=batch, heads=heads, key_heads=x.key.shape[1], queries=queries, keys=x.key_count, dim=dim,
        window=x.window, ring_start=int(x.ring_start) % max(1, x.key_count), threads=torch.get_num_threads(),
        scale=x.scale * math.log2(math.e),
    )  # fmt: skip
    if x.far is not None:
        call.far_query, call.far_key, call.far_value = rows(x.far.query), rows(x.far.key), rows(x.far.value)
        call.far_count, call.far_positions = x.far.key.shape[2], integers(x.far.positions)
        call.far_positions_batch = call.far_count if len(x.far.positions) > 1 else 0
    if x.first_valid is not None:
        call.first_valid = integers(x.first_valid)
    if out.numel():
        getattr(library(), f"{'decode' if few else 'prefill'}_{SUFFIX[x.query.dtype]}")(ctypes.byref(call))
    return out, lse
