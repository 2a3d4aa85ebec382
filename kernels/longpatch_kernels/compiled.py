"""The operation as one opaque node for `torch.compile`: custom operators, forward and backward, with known shapes.

Eager calls do not come through here.
"""

import torch
from torch import Tensor

from .autograd import without_autocast
from .implementations import IMPLEMENTATIONS
from .inputs import FarSegment, LambdaInputs

TENSORS = (
    "query key value query_far key_far value_far far_positions far_mask far_distance first_valid alibi_slopes "
    "ring_tensor"
)
_SIGNATURE = (
    ", ".join(f"Tensor{'?' * (index > 2)} {name}" for index, name in enumerate(TENSORS.split()))
    + ", SymInt window, SymInt ring_start, float scale, float? softcap, str implementation"
)


def run(x: LambdaInputs, implementation: str) -> tuple[Tensor, Tensor]:
    """What `implementation` returns for `x`, the output with strides of [B, n, Hq, d]."""
    dtype, module = x.query.dtype, IMPLEMENTATIONS[implementation]
    x = module.widened(x) if hasattr(module, "widened") else x
    far = x.far
    extra = (None, None, None) if far is None else (far.positions, far.mask, far.distance)
    ring_tensor, ring_start = (x.ring_start, 0) if isinstance(x.ring_start, Tensor) else (None, x.ring_start)
    options = (x.window, ring_start, x.scale, x.softcap, implementation)
    out, lse = torch.ops.longpatch.lambda_attention(
        *x.tensors, *extra, x.first_valid, x.alibi_slopes, ring_tensor, *options
    )
    return out.to(dtype), lse


def _inputs(arguments: tuple) -> LambdaInputs:
    tensors, (positions, mask, distance, first_valid, slopes, ring_tensor) = arguments[:6], arguments[6:12]
    window, ring_start, scale, softcap, _ = arguments[12:]
    query, key, value, query_far, key_far, value_far = tensors
    far = None if query_far is None else FarSegment(query_far, key_far, value_far, positions, mask, distance)
    ring_start = ring_start if ring_tensor is None else ring_tensor
    return LambdaInputs(query, key, value, window, far, first_valid, ring_start, scale, slopes, softcap)


@torch.library.custom_op("longpatch::lambda_attention", mutates_args=(), schema=f"({_SIGNATURE}) -> (Tensor, Tensor)")
def _forward(*arguments):
    with without_autocast(arguments[0].device):
        out, lse = IMPLEMENTATIONS[arguments[-1]].run(_inputs(arguments))
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


@_forward.register_fake
def _(query, *arguments):
    batch, heads, queries, dim = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(batch, queries, heads, dim).transpose(1, 2)
    return out, query.new_empty(batch, heads, queries, dtype=dtype)


@torch.library.custom_op(
    "longpatch::lambda_attention_backward",
    mutates_args=(),
    schema=f"({_SIGNATURE}, Tensor out, Tensor lse, Tensor? grad_out, Tensor? grad_lse) -> Tensor[]",
)
def _backward(*arguments):
    arguments, results = arguments[:-4], arguments[-4:]
    with without_autocast(arguments[0].device):
        grads = IMPLEMENTATIONS[arguments[-1]].gradients(_inputs(arguments), *results)
    return [grad.contiguous() for grad in grads if grad is not None]


@_backward.register_fake
def _(*arguments):
    return [t.new_empty(t.shape) for t in arguments[:6] if t is not None]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.options = inputs[12:]
    ctx.save_for_backward(*inputs[:12], *output)


def _differentiate(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    grads = iter(torch.ops.longpatch.lambda_attention_backward(*tensors, *ctx.options, out, lse, grad_out, grad_lse))
    return *(None if t is None else next(grads) for t in tensors[:6]), *[None] * 11


_forward.register_autograd(_differentiate, setup_context=_save)
