"""How much work Λ-attention is, in floating-point operations and bytes."""

from typing import NamedTuple


class Shape(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    dim: int
    tokens: int
    window: int
    sinks: int

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads}/{self.key_heads} d{self.dim} n{self.tokens} L{self.window} G{self.sinks}"


def pairs(shape: Shape) -> int:
    """Visible (query, key) pairs of one head: the window's band, and the sinks once they have left it.

    Sink `j` is a far key for the queries from `j + window` on.
    """
    tokens, window = shape.tokens, min(shape.window, shape.tokens)
    band = tokens * window - window * (window - 1) // 2
    return band + sum(max(0, tokens - shape.window - sink) for sink in range(shape.sinks))


def forward_flops(shape: Shape) -> int:
    """Two matrix products of 2 * d operations for each pair."""
    return 4 * shape.dim * shape.batch * shape.heads * pairs(shape)


def backward_flops(shape: Shape) -> int:
    """Five products instead of two; what a kernel recomputes beyond that is not counted."""
    return forward_flops(shape) * 5 // 2


def decode_bytes(shape: Shape, number_bytes: int = 2) -> int:
    """Every key and value in the window and the sinks, read once."""
    return 2 * shape.batch * shape.key_heads * (shape.window + shape.sinks) * shape.dim * number_bytes


def prefill_bytes(shape: Shape, number_bytes: int = 2) -> int:
    """query, query_far and out; key and value; the log-sum-exp."""
    rows = shape.batch * shape.tokens
    return rows * (shape.dim * number_bytes * (3 * shape.heads + 2 * shape.key_heads) + 4 * shape.heads)
