"""The function that transformers calls in place of its own attention."""

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    longpatch: tuple[Step, LambdaCache | None] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Λ-attention over rotated queries [B, Hq, n, d] and keys [B, Hkv, m, d], as AttentionInterface expects it.

    Keys come already rotated. Rotations compose: a query is brought to the distance of the sinks by R(D - position),
    the sinks to position 0 by R(-position). Learned sink logits `s_aux` [Hq] join the softmax as one more key per head
    whose value is 0 (gpt-oss). Returns [B, n, Hq, d] and no weights.
    """
    shared = attention_mask if longpatch is None else longpatch  # see Family.drops_keywords
    if shared is None:
        raise LongpatchError(
            f"{type(module).__name__}.forward", ["called outside the forward of its converted model"], "model(...)"
        )
    if dropout:
        raise LongpatchError("forward", [f"attention dropout of {dropout}"], "a model loaded with attention_dropout=0")
    step, cache = shared
    if step.decodes is not None and cache is not None:
        decode = step.decodes[cache.layers[module.layer_idx].kind]
        return decode.attend(query, key, value, scaling, softcap, s_aux), None
    layer = None if cache is None else cache.layers[module.layer_idx]
    settings = step.layers[module.layer_idx]
    config = settings.config
    oldest = step.past + step.count - key.shape[2]
    far = {}
    if config.global_branch and step.far_phase is not None and step.sink_columns is not None:
        if layer is None:
            key_far, value_far, _ = step.sinks(key, value, oldest, settings.rotated)
        else:
            key_far, value_far = layer.sinks(key, value, step)
        far = {
            "query_far": rotate(query, step.far_phase) if settings.rotated else query,
            "key_far": key_far,
            "value_far": value_far,
            "far_positions": step.sink_columns - oldest,
            "far_distance": None if alibi_slopes is None else config.distance,
        }
    if (
        not far
        and query.shape[2] == key.shape[2] <= config.local_branch
        and step.first_valid is None
        and softcap is s_aux is alibi_slopes is None
        and config.implementation == "auto"
    ):  # the text is shorter than the window: what an unconverted model computes
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    out, lse = lambda_attention(
        query,
        key,
        value,
        window=config.local_branch,
        first_valid=None if step.first_valid is None else step.first_valid - oldest,
        ring_start=0 if layer is None else layer.ring_start,
        scale=scaling,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        implementation=config.implementation,
        **far,
    )
    if config.recall is not None:
        memory = passing_memory(key, value, step, settings) if layer is None else layer.memory
        out, lse = join(out, lse, query, memory, step, settings, scaling, softcap, alibi_slopes)
    if s_aux is not None:
        out = (out * (lse - s_aux[:, None]).sigmoid()[..., None]).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None
