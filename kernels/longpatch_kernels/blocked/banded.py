"""Λ-attention from PyTorch's CPU flash-attention kernel, called on blocks of queries and the band of keys each can see.

Blocks that see a whole window are one kernel call on overlapping views. The far segment is a second call, merged by
log-sum-exp. Backward calls the kernel's own backward with the merged output and log-sum-exp.

Shapes: S = batch x key heads, g query heads a key head, N blocks in one call, R queries a block, W keys a band.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..inputs import FarSegment, Gradients, LambdaInputs
from .bands import Band, bands

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_KEYS = 24  # far keys for which products are faster than the kernel

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d] and log-sum-exp [B, Hq, n] in float32."""
    x = x.in_time_order().dense()  # PyTorch's kernel does not ask for the last stride
    if _is_causal(x):
        query, key, value = _expanded(x)
        out, lse = _kernel(query, key, value, 0.0, True, scale=x.scale)
        if x.group == 1:
            return out, lse
        return out.reshape(x.query.shape), lse.reshape(x.query.shape[:3])
    # strides as the kernel's own output has them: the next projection reads all heads of a token
    out = torch.empty_like(x.query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = out.new_empty(out.shape[:3], dtype=torch.float32)
    for rows, _, part in _without_padding(x):
        for band in bands(part):
            _forward(part, band, out[rows], lse[rows])
    return out, lse


def backward(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients:
    """Gradients of the inputs, through `out` alone: the kernel's backward takes no gradient of the log-sum-exp."""
    ordered, grad_out = x.in_time_order().dense(), grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    if _is_causal(ordered):
        far = [t if t is None else torch.zeros_like(t) for t in x.tensors[3:]]
        return x.as_stored((*_causal_backward(ordered, out, lse, grad_out), *far))
    grads = _empty_gradients(x)
    # exp(score - lse) is then 0 where a query sees nothing
    lse = lse.masked_fill(lse.isneginf(), torch.inf)
    for rows, dropped, part in _without_padding(ordered):
        query, key, value, *far = (t[rows] for t in grads)
        own = query, key[:, :, dropped:], value[:, :, dropped:], *far
        for band in bands(part, in_backward=True):
            _backward(part, band, out[rows], lse[rows], grad_out[rows], own)
    return x.as_stored((*grads, *[None] * (6 - len(grads))))


def _empty_gradients(x: LambdaInputs) -> list[Tensor]:
    """In float32; those of queries are going to be written, those of keys and values added to."""
    make = (torch.empty_like, torch.zeros_like, torch.zeros_like) * 2
    return [new(t, dtype=torch.float32) for new, t in zip(make, x.tensors, strict=True) if t is not None]


def _causal_backward(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor) -> list[Tensor]:
    query, key, value = _expanded(x)
    grad_out, out, lse = grad_out.reshape(query.shape), out.reshape(query.shape), lse.reshape(query.shape[:3])
    of_query, *of_shared = _kernel_backward(grad_out, query, key, value, out, lse, 0.0, True, scale=x.scale)
    # each key head collects from the query heads that share it
    of_keys = (t.reshape(*x.key.shape[:2], x.group, *x.key.shape[2:]).sum(dim=2) for t in of_shared)
    return [of_query.reshape(x.query.shape), *of_keys]


def _is_causal(x: LambdaInputs) -> bool:
    """No query has lost a key out of its window, so the call is ordinary causal attention.

    The kernel scales its causal mask as well: -inf times a scale that is not positive would show what it hides.
    """
    n = x.query_count
    return x.scale > 0 and n == x.key_count <= x.window and not any(_padding(x)) and not _far_visible(x, n - 1)


def _padding(x: LambdaInputs) -> list[int]:
    """Keys to drop from each row's front."""
    return [] if x.first_valid is None else x.first_valid.clamp(0, x.key_count).tolist()


def _without_padding(x: LambdaInputs) -> Iterator[tuple[slice, int, LambdaInputs]]:
    """Batch rows, keys dropped, and the call without these: the whole batch, or row by row where a row is padded."""
    padding = _padding(x)
    if not any(padding):
        yield slice(None), 0, replace(x, first_valid=None)
        return
    for row, dropped in enumerate(padding):
        rows, far = slice(row, row + 1), x.far
        query, key, value = x.query[rows], x.key[rows, :, dropped:], x.value[rows, :, dropped:]
        if far is not None:
            far = FarSegment(
                query=far.query[rows],
                key=far.key[rows],
                value=far.value[rows],
                given_positions=far.positions[rows if len(far.positions) > 1 else slice(None)] - dropped,
                mask=None if far.mask is None else far.mask[rows],
                distance=None,
            )
        yield rows, dropped, replace(x, query=query, key=key, value=value, far=far, first_valid=None)


def _far_visible(x: LambdaInputs, position: int) -> bool:
    """Whether a query at `position` sees the oldest far key."""
    return x.far is not None and position - x.far.oldest >= x.window


def _expanded(x: LambdaInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query [S, g, n, d] and keys and values [S, g, m, d], each key head seen g times without a copy."""
    if x.group == 1:
        return x.query, x.key, x.value
    query = x.query.reshape(-1, x.group, *x.query.shape[2:])
    key, value = (t.flatten(0, 1)[:, None].expand(-1, x.group, -1, -1) for t in (x.key, x.value))
    return query, key, value


def _far_hidden(x: LambdaInputs, far: FarSegment, band: Band) -> Tensor | None:
    """True where a far key is not to be seen, [N, S, g R, f]; None if the band's queries see all of them."""
    if far.mask is None and band.position - int(far.positions.max()) >= x.window:
        return None
    position = torch.arange(band.position, band.position + band.rows.stop - band.rows.start)
    hidden = position[:, None] - far.positions[:, None, None, :] < x.window
    if far.mask is not None:
        hidden = hidden | ~far.mask[:, :, band.rows]
    return band.of_rows(hidden.expand(*x.query.shape[:2], -1, -1))


def _float_mask(hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _window(x: LambdaInputs, band: Band) -> tuple[Tensor, Tensor]:
    """One band's out [N, B, Hkv, g, R, d] and lse [N, B, Hkv, g, R] over window keys alone."""
    if not band.width:
        shape = band.view(x.query).shape
        return x.query.new_zeros(shape), torch.full(shape[:-1], -torch.inf)
    query, key, value = band.queries(x.query), band.keys(x.key), band.keys(x.value)
    out, lse = _kernel(query, key, value, attn_mask=band.mask, scale=x.scale)
    return band.split(out), band.split(lse)


def _far(x: LambdaInputs, far: FarSegment, band: Band) -> tuple[Tensor, Tensor]:
    """The same over far keys alone."""
    whole = band.as_one_block()
    hidden = _far_hidden(x, far, whole)
    query, key, value = whole.queries(far.query), whole.shared(far.key), whole.shared(far.value)
    if key.shape[2] <= FEW_KEYS and key.dtype == torch.float32:
        out, lse = _products(query, key, value, hidden, x.scale)
    else:
        out, lse = _kernel(query, key, value, attn_mask=_float_mask(hidden), scale=x.scale)
        if hidden is not None:  # the kernel says 0 where a row sees nothing
            lse = lse.masked_fill(hidden.all(dim=-1), -torch.inf)
    out, lse = (whole.split(part)[0].unflatten(3, (band.count, band.block)).movedim(3, 0) for part in (out, lse))
    return out, lse


def _products(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel's result by plain products, scores [..., f, rows] transposed: ten keys in half the time."""
    scores = (key * scale) @ query.mT
    if hidden is not None:
        scores.masked_fill_(hidden.mT, -torch.inf)
    largest = scores.amax(dim=-2, keepdim=True)
    if hidden is not None:
        largest.masked_fill_(largest.isneginf(), 0.0)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(dim=-2, keepdim=True)
    out = weights.div_(total.clamp_min(torch.finfo(total.dtype).tiny)).mT @ value
    return out, largest.add_(total.log_()).squeeze(-2)


def _forward(x: LambdaInputs, band: Band, out: Tensor, lse: Tensor):
    """Write one band's rows of out and lse, or add a second band to them."""
    target, target_lse = band.view(out), band.view(lse)
    window, window_lse = _window(x, band)
    if band.runs:
        _merge(target, target_lse, window, window_lse, target)
        return
    if x.far is not None and _far_visible(x, band.last_position):
        _merge(window, window_lse, *_far(x, x.far, band), target)
    else:
        target.copy_(window)
    target_lse.copy_(window_lse)


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, target: Tensor):
    """Two results over disjoint keys as one: out into `target`, log-sum-exp into `lse`."""
    weight = torch.sigmoid(more_lse - lse).nan_to_num_(nan=0.0)[..., None]  # NaN: neither saw anything
    torch.logaddexp(lse, more_lse, out=lse)
    if target.dtype == torch.float32:
        torch.lerp(out, more, weight, out=target)
    else:
        target.copy_(torch.lerp(out.float(), more.float(), weight))


def _backward(x: LambdaInputs, band: Band, out: Tensor, lse: Tensor, grad_out: Tensor, grads: Sequence[Tensor]):
    """Write one band's rows of the query gradients, add to the others."""
    if band.width:
        query, key, value = band.queries(x.query), band.keys(x.key), band.keys(x.value)
        given = band.queries(grad_out), query, key, value, band.queries(out), band.queries(lse)
        of_query, of_key, of_value = _kernel_backward(*given, 0.0, False, attn_mask=band.mask, scale=x.scale)
        write = Tensor.add_ if band.runs else Tensor.copy_
        write(band.view(grads[0]), band.split(of_query))
        band.add_to_keys(grads[1], of_key)
        band.add_to_keys(grads[2], of_value)
    else:
        band.view(grads[0]).zero_()
    if x.far is None or band.runs:
        return
    if not _far_visible(x, band.last_position):
        band.view(grads[3]).zero_()
        return
    query, key, value = band.queries(x.far.query), band.shared(x.far.key), band.shared(x.far.value)
    given = band.queries(grad_out), query, key, value, band.queries(out), band.queries(lse)
    mask = _float_mask(_far_hidden(x, x.far, band))
    of_query, of_key, of_value = _kernel_backward(*given, 0.0, False, attn_mask=mask, scale=x.scale)
    band.view(grads[3]).copy_(band.split(of_query))
    grads[4].add_(of_key.sum(dim=0).view_as(grads[4]))
    grads[5].add_(of_value.sum(dim=0).view_as(grads[5]))
