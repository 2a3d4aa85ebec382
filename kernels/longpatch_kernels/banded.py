"""Λ-attention from PyTorch's CPU flash-attention kernel, called on blocks of queries and the band of keys each can see.

Blocks that see a whole window are one kernel call on overlapping views. The far segment is a second call, merged by
log-sum-exp. Backward calls the kernel's own backward with the merged output and log-sum-exp.

Shapes: S = batch x key heads, g query heads a key head, N blocks in one call, R queries a block, W keys a band.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .bands import Band, bands
from .inputs import FarSegment, Gradients, LambdaInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d] and log-sum-exp [B, Hq, n] in float32."""
    x = x.in_time_order()
    if _is_causal(x):
        query, key, value = _expanded(x)
        out, lse = _kernel(query, key, value, 0.0, True, scale=x.scale)
        return out.reshape(x.query.shape), lse.reshape(x.query.shape[:3])
    # strides as the kernel's own output has them: the next projection reads all heads of a token
    out = torch.empty_like(x.query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = out.new_empty(out.shape[:3], dtype=torch.float32)
    for rows, _, part in _without_padding(x):
        for band in bands(part):
            _forward(part, band, out[rows], lse[rows])
    return out, lse


def backward(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: None) -> Gradients:
    """Gradients of the inputs, through `out` alone: the kernel's backward takes no gradient of the log-sum-exp."""
    assert grad_lse is None
    ordered = x.in_time_order()
    grads = [t if t is None else torch.zeros_like(t, dtype=torch.float32) for t in x.tensors]
    if _is_causal(ordered):
        query, key, value = _expanded(ordered)
        grad_out, out = grad_out.reshape(query.shape), out.reshape(query.shape)
        computed = _kernel_backward(
            grad_out, query, key, value, out, lse.reshape(query.shape[:3]), 0.0, True, scale=x.scale
        )
        for grad, part in zip(grads, computed, strict=False):
            shared = part.numel() // grad.numel()  # query heads that share the key head
            grad.copy_(part.reshape(*grad.shape[:2], shared, *grad.shape[2:]).sum(dim=2))
    else:
        # exp(score - lse) is then 0 where a query sees nothing
        lse = lse.masked_fill(lse.isneginf(), torch.inf)
        for rows, dropped, part in _without_padding(ordered):
            targets = [t if t is None else t[rows] for t in grads]
            targets[1:3] = (t[:, :, dropped:] for t in targets[1:3])
            for band in bands(part, in_backward=True):
                _backward(part, band, out[rows], lse[rows], grad_out[rows], targets)
    if ordered is not x:
        grads[1:3] = (grad.roll(x.ring_start, dims=2) for grad in grads[1:3])
    return tuple(grads)


def _is_causal(x: LambdaInputs) -> bool:
    """No query has lost a key out of its window, so the call is ordinary causal attention."""
    n = x.query_count
    return n == x.key_count <= x.window and not any(_padding(x)) and not _far_visible(x, n - 1)


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
                positions=far.positions[rows if len(far.positions) > 1 else slice(None)] - dropped,
                mask=None if far.mask is None else far.mask[rows],
                distance=None,
            )
        yield rows, dropped, replace(x, query=query, key=key, value=value, far=far, first_valid=None)


def _far_visible(x: LambdaInputs, position: int) -> bool:
    """Whether a query at `position` sees the oldest far key."""
    return x.far is not None and x.far.key.shape[2] > 0 and position - int(x.far.positions.min()) >= x.window


def _expanded(x: LambdaInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query [S, g, n, d] and keys and values [S, g, m, d], each key head seen g times without a copy."""
    if x.group == 1:
        return x.query, x.key, x.value
    query = x.query.reshape(-1, x.group, *x.query.shape[2:])
    key, value = (t.flatten(0, 1)[:, None].expand(-1, x.group, -1, -1) for t in (x.key, x.value))
    return query, key, value


def _far_hidden(x: LambdaInputs, band: Band) -> Tensor | None:
    """True where a far key is not to be seen, [N, S, g R, f]; None if the band's queries see all of them."""
    assert x.far is not None
    if x.far.mask is None and band.position - int(x.far.positions.max()) >= x.window:
        return None
    position = torch.arange(band.position, band.position + band.rows.stop - band.rows.start)
    hidden = position[:, None] - x.far.positions[:, None, None, :] < x.window
    if x.far.mask is not None:
        hidden = hidden | ~x.far.mask[:, :, band.rows]
    return band.of_rows(hidden.expand(*x.query.shape[:2], -1, -1))


def _float_mask(hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _forward(x: LambdaInputs, band: Band, out: Tensor, lse: Tensor):
    """Write one band's rows of out and lse."""
    target, target_lse = band.view(out), band.view(lse)
    if band.width:
        query, key, value = band.queries(x.query), band.keys(x.key), band.keys(x.value)
        part, part_lse = _kernel(query, key, value, attn_mask=band.mask, scale=x.scale)
        part, part_lse = band.split(part), band.split(part_lse)
    else:
        part, part_lse = torch.zeros_like(target), torch.full_like(target_lse, -torch.inf)
    if not _far_visible(x, band.last_position):
        target.copy_(part)
        target_lse.copy_(part_lse)
        return
    hidden = _far_hidden(x, band)
    query, key, value = band.queries(x.far.query), band.shared(x.far.key), band.shared(x.far.value)
    far, far_lse = _kernel(query, key, value, attn_mask=_float_mask(hidden), scale=x.scale)
    if hidden is not None:  # the kernel says 0 where a row sees nothing
        far_lse = far_lse.masked_fill(hidden.all(dim=-1), -torch.inf)
    far, far_lse = band.split(far), band.split(far_lse)
    torch.logaddexp(part_lse, far_lse, out=target_lse)
    weight = far_lse.sub(target_lse).exp_().nan_to_num_(nan=0.0)[..., None]
    target.copy_(torch.lerp(part.float(), far.float(), weight))


def _backward(x: LambdaInputs, band: Band, out: Tensor, lse: Tensor, grad_out: Tensor, targets: list[Tensor]):
    """Write one band's rows of the query gradients, add to the others."""
    grad_query, grad_key, grad_value, grad_query_far, grad_key_far, grad_value_far = targets
    grad_out, out, lse = band.queries(grad_out), band.queries(out), band.queries(lse)
    if band.width:
        query, key, value = band.queries(x.query), band.keys(x.key), band.keys(x.value)
        of_query, of_key, of_value = _kernel_backward(
            grad_out, query, key, value, out, lse, 0.0, False, attn_mask=band.mask, scale=x.scale
        )
        band.view(grad_query).copy_(band.split(of_query))
        band.add_to_keys(grad_key, of_key)
        band.add_to_keys(grad_value, of_value)
    if _far_visible(x, band.last_position):
        query, key, value = band.queries(x.far.query), band.shared(x.far.key), band.shared(x.far.value)
        mask = _float_mask(_far_hidden(x, band))
        of_query, of_key, of_value = _kernel_backward(
            grad_out, query, key, value, out, lse, 0.0, False, attn_mask=mask, scale=x.scale
        )
        band.view(grad_query_far).copy_(band.split(of_query))
        grad_key_far += of_key.sum(dim=0).view_as(grad_key_far)
        grad_value_far += of_value.sum(dim=0).view_as(grad_value_far)
