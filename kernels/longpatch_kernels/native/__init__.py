"""Λ-attention on a CPU by a C++ kernel of our own, compiled on first use, and its gradients."""

import ctypes
import math

import torch
from torch import Tensor

from .. import blocked
from ..blocked import blocks, decode, widened
from ..inputs import Gradients, LambdaInputs
from .build import library

__all__ = ["gradients", "not_supported_reasons", "run", "widened", "worthwhile"]

SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LEAST_PAIRS = 2**10  # of query and key: compiling takes seconds, once a machine; smaller calls are not worth it


def not_supported_reasons(inputs: LambdaInputs) -> list[str]:
    reasons = []
    if not inputs.query.is_cpu:
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
    return blocked.differentiable(inputs, forward, gradients)


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


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in ("out", "query", "key", "value")),
        ("shift", ctypes.c_void_p),
        ("correction", ctypes.c_void_p),
    )


class _Kept(list):
    """Whatever the kernel reads, until it has."""

    def rows(self, tensor: Tensor) -> _Rows:
        batch, head, row, number = tensor.stride()
        if number != 1:
            return self.rows(tensor.contiguous())
        self.append(tensor)
        return _Rows(tensor.data_ptr(), batch, head, row)

    def numbers(self, tensor: Tensor, dtype: torch.dtype) -> int:
        self.append(tensor.to(dtype).contiguous())
        return self[-1].data_ptr()

    def call(self, x: LambdaInputs) -> _Call:
        """The call without its results and its far segment."""
        batch, heads, queries, dim = x.query.shape
        call = _Call(
            query=self.rows(x.query), key=self.rows(x.key), value=self.rows(x.value),
            batch=batch, heads=heads, key_heads=x.key.shape[1], queries=queries, keys=x.key_count, dim=dim,
            window=x.window, ring_start=int(x.ring_start) % max(1, x.key_count), threads=torch.get_num_threads(),
            scale=x.scale * math.log2(math.e),
        )  # fmt: skip
        if x.first_valid is not None:
            call.first_valid = self.numbers(x.first_valid, torch.int64)
        return call


def _run(name: str, dtype: torch.dtype, *arguments: ctypes.Structure) -> None:
    getattr(library(), f"{name}_{SUFFIX[dtype]}")(*map(ctypes.byref, arguments))


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d], in memory [B, n, Hq, d], and log-sum-exp [B, Hq, n] in float32."""
    few = decode.suits(x)
    x = x if few else x.in_time_order()
    batch, heads, queries, dim = x.query.shape
    out = x.query.new_empty(batch, queries, heads, dim)
    out = out.view(batch, heads, 1, dim) if queries == 1 else out.transpose(1, 2)
    lse = out.new_empty(batch, heads, queries, dtype=torch.float32)
    kept = _Kept()
    call = kept.call(x)
    call.out, call.lse = kept.rows(out), lse.data_ptr()
    if x.far is not None:
        call.far_query, call.far_key, call.far_value = map(kept.rows, (x.far.query, x.far.key, x.far.value))
        call.far_count, call.far_positions = x.far.key.shape[2], kept.numbers(x.far.positions, torch.int64)
        call.far_positions_batch = call.far_count if x.far.positions.shape[0] > 1 else 0
    if out.numel():
        _run("decode" if few else "prefill", x.query.dtype, call)
    return out, lse


def gradients(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None) -> Gradients:
    """Gradients of the six tensors of `x`: of the window by the kernel, of the far segment by plain products."""
    if torch.is_grad_enabled() or grad_out is None or x.query.dtype != torch.float32:
        return blocked.gradients(x, out, lse, grad_out, grad_lse)  # whose own gradients are known
    ordered = x.in_time_order()
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x.query, x.key, x.value)]
    correction = blocks.correction_of(out, lse, grad_out, grad_lse)
    kept = _Kept()
    found = _Gradients(
        out=kept.rows(grad_out),
        **{name: kept.rows(grad) for name, grad in zip(("query", "key", "value"), grads, strict=True)},
        shift=kept.numbers(lse.masked_fill(lse.isneginf(), torch.inf), torch.float32),
        correction=kept.numbers(correction, torch.float32),
    )
    if out.numel():
        _run("backward", torch.float32, kept.call(ordered), found)
    far = (None,) * 3 if x.far is None else blocks.gradients_of(ordered, lse, grad_out, correction, ("far",))[3:]
    return x.as_stored((*grads, *far))
