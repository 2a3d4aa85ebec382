"""`lambda_attention`: check the arguments, choose an implementation, run it."""

from operator import attrgetter

import torch
from torch import Tensor

from . import compiled
from .autograd import autocast, autocasts, without_autocast
from .implementations import IMPLEMENTATIONS, choose, explanation, reasons_against
from .inputs import checked_inputs, filled_in

MOST_CALLS = 1024
# What "auto" chose for calls that were found right: a small call notices being checked (30 to 100 us where caches are
# cold, as between the layers of a model), and most calls are like one before.
_chosen: dict[tuple, str] = {}
_kind = attrgetter("shape", "dtype", "device")


def lambda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    query_far: Tensor | None = None,
    key_far: Tensor | None = None,
    value_far: Tensor | None = None,
    far_positions: Tensor | None = None,
    far_mask: Tensor | None = None,
    first_valid: Tensor | None = None,
    ring_start: int | Tensor = 0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    far_distance: float | Tensor | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Λ-shaped attention (LM-Infinite, arXiv 2308.16137, section 3): one softmax over a window and a far segment.

    With window 3 and two far keys F (the sinks: tokens 0 and 1, scored by `query_far`), six queries see::

        query 0   1 0 0 0 0 0      F marks where a token is seen as a far key: once its position has left the window.
        query 1   1 1 0 0 0 0
        query 2   1 1 1 0 0 0
        query 3   F 1 1 1 0 0
        query 4   F F 1 1 1 0
        query 5   F F 0 1 1 1

    Positions count from the oldest window key; query `i` of `n` stands at `m - n + i`, so keys in front of the queries
    are a cache.

    Args:
        query: `[B, Hq, n, d]`, key and value: `[B, Hkv, m, d]`; Hq is a multiple of Hkv; m >= n. `key` is in time
            order, wrapping at `ring_start`: its oldest entry is `key[:, :, ring_start]`. As an integer tensor of one
            element it is not checked, and a decode step then has the same shapes and constants every time.
        window: number of most recent keys each query sees, itself included.
        query_far: `[B, Hq, n, d]`, key_far and value_far: `[B, Hkv, f, d]`. A far key is seen once its position
            (`far_positions`, `[f]` or `[B, f]`, may be negative, default 0..f-1) has left the query's window and
            `far_mask` (`[B, Hq, n, f]`, True = allowed), where given, allows it.
        first_valid: `[B]`, window keys before this position are left padding; may be negative.
        scale: multiplies the scores; default `d ** -0.5`.
        alibi_slopes: `[Hq]`; subtracts slope x distance, where a far key's distance is `far_distance` (a number, `[f]`
            or `[B, f]`; default the window).
        softcap: scores become `softcap * tanh(score / softcap)` (before ALiBi).
        implementation: "auto" or a name in IMPLEMENTATIONS. One asked for by name that cannot run raises.

    Queries, keys and values are of one dtype; under autocast they are brought to its dtype, as PyTorch's own attention
    does, and products that are meant to be in float32 stay so. They must be finite where they are hidden, too: some
    implementations give them weight 0, and 0 times NaN is NaN.

    Returns:
        out `[B, Hq, n, d]` in the query's dtype and lse `[B, Hq, n]` in float32 or better, both differentiable. A query
        that sees no key gets 0 and -inf.

    Raises:
        ValueError: listing everything that is wrong with the arguments, or why the implementation cannot run.
    """
    casts = autocasts(query.device)
    if casts:
        query, key, value, query_far, key_far, value_far = autocast(query, key, value, query_far, key_far, value_far)
    arguments = (
        query, key, value, window, query_far, key_far, value_far, far_positions, far_mask, first_valid, ring_start,
        scale, alibi_slopes, far_distance, softcap,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    call = None if compiling or implementation != "auto" else _alike(*arguments)
    name = None if call is None else _chosen.get(call)
    inputs = checked_inputs(*arguments) if name is None else filled_in(*arguments)
    if name is None:
        name = choose(implementation, inputs)
        if call is not None:
            if len(_chosen) == MOST_CALLS:
                _chosen.clear()
            _chosen[call] = name
    if compiling and hasattr(IMPLEMENTATIONS[name], "gradients"):
        return compiled.run(inputs, name)
    if not casts:
        return IMPLEMENTATIONS[name].run(inputs)
    with without_autocast(query.device):
        return IMPLEMENTATIONS[name].run(inputs)


def _alike(
    query, key, value, window, query_far, key_far, value_far, far_positions, far_mask, first_valid, ring_start, scale,
    alibi_slopes, far_distance, softcap,
) -> tuple | None:  # fmt: skip
    """The same for two calls whose arguments are both right or both wrong, and for which "auto" makes the same choice.

    None if that is not to be seen from kinds and numbers.
    """
    numbers = isinstance(window, int) and isinstance(far_distance, int | float | None) and isinstance(ring_start, int)
    if not numbers or key.ndim != 4 or not 0 <= ring_start < max(1, key.shape[2]):
        return None
    options = query_far, key_far, value_far, far_positions, far_mask, first_valid, alibi_slopes
    kinds = [t if t is None else _kind(t) for t in (query, key, value, *options)]
    return window, scale, softcap, far_distance, *kinds


def not_supported_reasons(implementation: str, query: Tensor, key: Tensor, value: Tensor, **options) -> list[str]:
    """Every reason why `implementation` cannot run `lambda_attention(query, key, value, **options)`; none if it can."""
    return reasons_against(implementation, checked_inputs(query, key, value, **options))


def explain(query: Tensor, key: Tensor, value: Tensor, **options) -> str:
    """What `lambda_attention(query, key, value, **options)` runs by "auto", and why not each other implementation."""
    return explanation(checked_inputs(query, key, value, **options))
