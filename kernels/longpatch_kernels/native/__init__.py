"""Λ-attention on a CPU by a C++ kernel of our own, compiled on first use, and its gradients."""

import ctypes

import torch
from torch import Tensor

from .. import blocked
from ..blocked import decode, products, widened
from ..blocked.products import LOG2E
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

    def rows(self, tensor: Tensor) -> tuple[int, ...]:
        """The fields of a _Rows."""
        batch, head, row, number = tensor.stride()
        if number != 1:
            return self.rows(tensor.contiguous())
        self.append(tensor)
        return tensor.data_ptr(), batch, head, row

    def numbers(self, tensor: Tensor, dtype: torch.dtype) -> int:
        self.append(tensor.to(dtype).contiguous())
        return self[-1].data_ptr()

    def call(self, x: LambdaInputs, out: Tensor | None = None, lse: Tensor | None = None) -> _Call:
        """The call, with its far segment where there are results to be written. By position: names take longer."""
        nothing = (0, 0, 0, 0)
        far_rows, positions, positions_batch, far_count, far = (nothing,) * 3, 0, 0, 0, x.far
        if far is not None and out is not None:
            far_rows, far_count = tuple(map(self.rows, (far.query, far.key, far.value))), far.key.shape[2]
            places = far.positions
            positions, positions_batch = self.numbers(places, torch.int64), far_count if places.shape[0] > 1 else 0
        batch, heads, queries, dim = x.query.shape
        key_heads, keys = x.key.shape[1:3]
        return _Call(
            self.rows(x.query), self.rows(x.key), self.rows(x.value), *far_rows,
            nothing if out is None else self.rows(out), 0 if lse is None else lse.data_ptr(),
            positions, positions_batch, 0 if x.first_valid is None else self.numbers(x.first_valid, torch.int64),
            batch, heads, key_heads, queries, keys, dim, x.window, far_count,
            int(x.ring_start) % max(1, keys), torch.get_num_threads(), x.scale * LOG2E,
        )  # fmt: skip


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
    if out.numel():
        _run("decode" if few else "prefill", x.query.dtype, kept.call(x, out, lse))
    return out, lse


def gradients(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None) -> Gradients:
    """Gradients of the six tensors of `x`: of the window by the kernel, of the far segment by plain products."""
    if torch.is_grad_enabled() or grad_out is None or x.query.dtype != torch.float32:
        return blocked.gradients(x, out, lse, grad_out, grad_lse)  # whose own gradients are known
    ordered = x.in_time_order()
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x.query, x.key, x.value)]
    correction = products.correction_of(out, lse, grad_out, grad_lse)
    kept = _Kept()
    found = _Gradients(
        out=kept.rows(grad_out),
        **{name: kept.rows(grad) for name, grad in zip(("query", "key", "value"), grads, strict=True)},
        shift=kept.numbers(lse.masked_fill(lse.isneginf(), torch.inf), torch.float32),
        correction=kept.numbers(correction, torch.float32),
    )
    if out.numel():
        _run("backward", torch.float32, kept.call(ordered), found)
    far = (None,) * 3 if x.far is None else products.gradients_of(ordered, lse, grad_out, correction, ("far",))[3:]
    return x.as_stored((*grads, *far))
