"""GPT-J: its attention does not go through transformers' interface, and its table of phases ends at `n_positions`."""

from typing import Any

import torch

from ..attention import attend
from ..forward import prepare_forward, share_as_positions
from ..rope import ExactRotary, rotate


def convert_attention(model: Any, conversion: Any) -> ExactRotary:
    """Set up one model; what it changes is undone by `conversion`."""
    base = model.base_model
    dim = model.config.rotary_dim
    frequencies = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))  # as the model makes its table
    frequencies, scaling = getattr(base, "interpolated", (frequencies, 1.0))
    rotary = ExactRotary(frequencies, scaling, interleaved=True)
    conversion.hook(base, prepare_forward)
    conversion.hook(base, share_as_positions)
    for block in base.h:
        conversion.replace_forward(block.attn, forward)
    return rotary


def forward(module: Any, hidden_states, position_ids, layer_past=None, **kwargs):
    """Stands in for GPTJAttention.forward: [B, n, hidden] to [B, n, hidden], no weights."""
    phase, shared = position_ids
    query, key, value = (
        projection(hidden_states).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = rotate(query, phase), rotate(key, phase)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    dropout = module.attn_dropout.p if module.training else 0.0
    out, _ = attend(module, query, key, value, None, dropout=dropout, longpatch=shared)
    return module.resid_dropout(module.out_proj(out.flatten(2))), None
