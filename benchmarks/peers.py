"""What Λ-attention is timed against on a GPU. A peer is one function that prepares a call from the same tensors."""

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.roofline import Shape
from longpatch_kernels.flex import block_mask, window_mask


def torch_flash_window(arguments: dict, shape: Shape) -> Callable:
    """PyTorch's own flash-attention kernel with its window; no sinks."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    key, value = (t.repeat_interleave(shape.heads // shape.key_heads, dim=1) for t in (key, value))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))

    def call():
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, shape.tokens, shape.tokens, 0.0, True, False,
            scale=shape.dim**-0.5, window_size_left=shape.window - 1, window_size_right=0,
        )[0].transpose(1, 2)  # fmt: skip

    return call


def flex_window(arguments: dict, shape: Shape) -> Callable:
    """FlexAttention, compiled, with the window as a block mask; no sinks."""
    mask = window_mask(shape.tokens, shape.tokens, shape.window, arguments["query"].device)
    return _flex(arguments, shape, mask, None)


def flex_lambda(arguments: dict, shape: Shape) -> Callable:
    """FlexAttention computing the whole of Λ-attention in one call: the sinks' scores are looked up by `score_mod`."""
    group = shape.heads // shape.key_heads
    far_keys = arguments["key_far"].repeat_interleave(group, dim=1)
    far_scores = (arguments["query_far"] @ far_keys.mT).float() * shape.dim**-0.5  # [B, H, n, G]

    def visible(batch, head, query, key):
        return (query >= key) & ((query - key < shape.window) | (key < shape.sinks))

    def rescored(score, batch, head, query, key):
        far = (key < shape.sinks) & (query - key >= shape.window)
        sink = torch.where(key < shape.sinks, key, 0)
        return torch.where(far, far_scores[batch, head, query, sink].to(score.dtype), score)

    device = arguments["query"].device
    mask = block_mask(visible, shape.tokens, shape.tokens, shape.window, device, sinks=shape.sinks)
    return _flex(arguments, shape, mask, rescored)


def _flex(arguments: dict, shape: Shape, mask, rule) -> Callable:
    compiled = torch.compile(flex_attention)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    return lambda: compiled(query, key, value, rule, mask, enable_gqa=shape.heads > shape.key_heads)


# {name: (prepares the call, computes the same thing as we do)}
PEERS: dict[str, tuple[Callable[[dict, Shape], Callable], bool]] = {
    "torch flash, window only": (torch_flash_window, False),
    "FlexAttention, window only": (flex_window, False),
    "FlexAttention, Λ": (flex_lambda, True),
}
