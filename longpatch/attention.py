"""The function that transformers calls in place of its own attention."""

from typing import Any

from torch import Tensor

from longpatch_kernels import lambda_attention

from .cache import LambdaCache
from .errors import LongpatchError
from .recall.join import join, passing_memory
from .rope import rotate
from .step import Step

NAME = "longpatch"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    longpatch: tuple[Step, LambdaCache | None] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Λ-attention over rotated queries [B, Hq, n, d] and keys [B, Hkv, m, d], as AttentionInterface expects it.

    Keys come already rotated. Rotations compose: a query is brought to the distance of the sinks by R(D - position),
    the sinks to position 0 by R(-position). Returns [B, n, Hq, d] and no weights.
    """
    if longpatch is None:
        raise LongpatchError(
            f"{type(module).__name__}.forward", ["called outside the forward of its converted model"], "model(...)"
        )
    if dropout:
        raise LongpatchError(
            "forward", [f"attention dropout of {dropout}"], "config.attention_dropout = 0 while training"
        )
    step, cache = longpatch
    layer = None if cache is None else cache.layers[module.layer_idx]
    oldest = step.past + step.count - key.shape[2]
    far = {}
    if step.config.global_branch:
        if layer is None:
            key_far, value_far, _ = step.sinks(key, value, first_column=oldest)
        else:
            key_far, value_far = layer.sinks(key, value, step)
        far = {
            "query_far": rotate(query, step.far_phase),
            "key_far": key_far,
            "value_far": value_far,
            "far_positions": step.sink_columns - oldest,
        }
    out, lse = lambda_attention(
        query,
        key,
        value,
        window=step.config.local_branch,
        first_valid=None if step.first_valid is None else step.first_valid - oldest,
        ring_start=0 if layer is None else layer.ring_start,
        scale=scaling,
        implementation=step.config.implementation,
        **far,
    )
    if step.lookup is not None and step.lookup.settings.covers(module.layer_idx):
        memory = passing_memory(key, value, step) if layer is None else layer.memory
        out = join(out, lse, query, memory, step, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None
