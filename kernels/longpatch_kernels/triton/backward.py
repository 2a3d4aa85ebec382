"""Triton backward: one kernel per owner of a gradient, scores recomputed from the saved log-sum-exp; deterministic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import LambdaInputs
from . import pack, tuning
from .far import far_grads
from .key import key_grads
from .query import query_grads
from .tiles import load_pair

DELTA_ROWS = 32


@triton.jit(do_not_specialize=["queries"])
def delta_kernel(
    out, grad_out, grad_lse, delta, queries, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """delta [B, Hq, n] = <out, grad_out> - grad_lse: what softmax subtracts from the gradient of each weight."""
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tile * BLOCK_M
    left, right = load_pair(out, grad_out, batch, head, start, queries, BLOCK_M, DIM, BLOCK_D, True)
    row = start + tl.arange(0, BLOCK_M)
    place = (batch.to(tl.int64) * tl.num_programs(0) + head) * queries + row
    sums = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    if grad_lse is not None:
        sums -= tl.load(grad_lse + place, mask=row < queries, other=0.0)
    tl.store(delta + place, sums, mask=row < queries)


def backward(
    x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, query_far, key_far, value_far. Expects keys in time order.

    Extra memory: one float32 per query and head, and the partial sums of the far keys.
    """
    batch, heads, queries, dim = x.query.shape
    delta = torch.empty_like(lse)
    delta_kernel[(heads, triton.cdiv(queries, DELTA_ROWS), batch)](
        pack.rows(out), pack.rows(grad_out), None if grad_lse is None else grad_lse.contiguous(), delta, queries,
        DIM=dim, BLOCK_D=tuning.padded(dim), BLOCK_M=DELTA_ROWS,
    )  # fmt: skip
    grad_key, grad_value = key_grads(x, grad_out, lse, delta)
    grad_query, grad_query_far = query_grads(x, grad_out, lse, delta)
    far = (None, None) if x.far is None else far_grads(x, x.far, grad_out, lse, delta)
    return grad_query, grad_key, grad_value, grad_query_far, *far
