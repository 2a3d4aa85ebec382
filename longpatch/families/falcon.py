"""Falcon with rotary phases: its attention does not go through transformers' interface."""

from typing import Any

from torch import nn

from ..attention import attend
from ..forward import prepare_forward, share_as_positions
from ..rope import ExactRotary, exact_rotary, rotate


def convert_attention(model: Any, conversion: Any) -> ExactRotary:
    """Set up one model; what it changes is undone by `conversion`."""
    base = model.base_model
    _, rotary = exact_rotary(base.rotary_emb, conversion.config.local_branch)
    conversion.hook(base, prepare_forward)
    conversion.hook(base, share_as_positions)
    conversion.set(base, "rotary_emb", NoPhases())
    for block in base.h:
        conversion.replace_forward(block.self_attention, forward)
    return rotary


class NoPhases(nn.Module):
    """Stands in for the rotary embedding: the phases come with the position ids."""

    def forward(self, x: Any, position_ids: Any) -> None:
        return None


def forward(module: Any, hidden_states, alibi, attention_mask, position_ids, layer_past=None, **kwargs):
    """Stands in for FalconAttention.forward: [B, n, hidden] to [B, n, hidden], no weights."""
    phase, shared = position_ids
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    if module.new_decoder_architecture:  # which repeats each key head for the queries that share it
        group = module.num_heads // module.num_kv_heads
        key, value = key[:, ::group], value[:, ::group]
    query, key = rotate(query, phase), rotate(key, phase)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    out, _ = attend(module, query, key, value, None, longpatch=shared)
    return module.dense(out.flatten(2)), None
