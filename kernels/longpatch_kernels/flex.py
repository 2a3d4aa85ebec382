"""FlexAttention as the window part of a composed Λ-attention, block masks from their bounds, not from all pairs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compose
from .inputs import LambdaInputs

BLOCK = 128  # FlexAttention's own


def block_mask(
    visible: Callable,
    queries: int,
    keys: int,
    window: int,
    device: torch.device,
    *,
    sinks: int = 0,
    filled: bool = True,
) -> Any:
    """A BlockMask of causal attention to the last `window` keys and the first `sinks`, which `visible` says one by one.

    What create_block_mask finds by looking at every pair (10 bytes each) is computed here for each pair of blocks, 128
    by 128. `filled`: whether blocks inside the window are wholly visible, so that `visible` is not asked there.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first = (
        torch.arange(0, queries, BLOCK, device=device)[:, None] + keys - queries
    )  # position of a block's first query
    last, key = first + BLOCK - 1, torch.arange(0, keys, BLOCK, device=device)
    seen = (key <= last) & ((key + BLOCK > first - window + 1) | (key < sinks))
    full = (key + BLOCK - 1 <= first) & (key > last - window) & filled

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        indices = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(dim=-1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]

    found = *ordered(seen & ~full), *ordered(full)
    return BlockMask.from_kv_blocks(*found, BLOCK, visible, seq_lengths=(queries, keys))


def window_mask(queries: int, keys: int, window: int, device: torch.device, first_valid: Tensor | None = None) -> Any:
    """The same for every layer of a model, so it is kept; but with padding, where no block is known to be filled."""
    if first_valid is None and not torch.compiler.is_compiling():
        return _kept(queries, keys, window, device)
    return _window_mask(queries, keys, window, device, first_valid)


@functools.lru_cache(maxsize=4)
def _kept(queries: int, keys: int, window: int, device: torch.device) -> Any:
    with torch.inference_mode(False):  # a later call may want gradients
        return _window_mask(queries, keys, window, device, None)


def _window_mask(queries: int, keys: int, window: int, device: torch.device, first_valid: Tensor | None) -> Any:
    offset = keys - queries

    def visible(batch, head, query, key):
        distance = query + offset - key
        seen = (distance >= 0) & (distance < window)
        return seen if first_valid is None else seen & (key >= first_valid[batch])

    return block_mask(visible, queries, keys, window, device, filled=first_valid is None)


@functools.cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


class Flex:
    """PyTorch's FlexAttention, compiled. It differentiates its own log-sum-exp, so autograd may merge the two parts."""

    def __init__(self, attention: Callable | None = None):
        self.attention = attention or _compiled

    def not_supported_reasons(self, inputs: LambdaInputs) -> list[str]:
        reasons = []
        if inputs.query.device.type == "cpu":
            reasons.append("the tensors are on cpu; compiled FlexAttention gives no log-sum-exp there")
        if inputs.query.dtype == torch.float64:
            reasons.append("dtype torch.float64; FlexAttention takes float16, bfloat16 and float32")
        return reasons

    def run(self, inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
        x = inputs.in_time_order()
        out, lse = self.window(x)
        return (out, lse) if x.far is None else compose.merge(out, lse, *compose.far_forward(x, x.far))

    def window(self, x: LambdaInputs) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.flex_attention import AuxRequest

        offset, valid, slopes, softcap = x.key_count - x.query_count, x.first_valid, x.alibi_slopes, x.softcap

        def changed(score, batch, head, query, key):
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if slopes is None else score - slopes[head] * (query + offset - key)

        mask = window_mask(x.query_count, x.key_count, x.window, x.query.device, valid)
        rule = None if softcap is None and slopes is None else changed
        out, aux = self.attention()(
            x.query, x.key, x.value, rule, mask, scale=x.scale, enable_gqa=x.group > 1, return_aux=AuxRequest(lse=True)
        )
        return out, aux.lse
