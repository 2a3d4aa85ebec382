"""MPT: its attention does not go through transformers' interface, and its distances are ALiBi's.

The model builds one ALiBi tensor a forward and hands it to every layer untouched. That is the way the step takes here:
it stands in for the tensor.
"""

import functools
from typing import Any

import torch

from ..attention import attend
from ..forward import no_mask, prepare_forward
from ..rope import ExactRotary


def convert_attention(model: Any, conversion: Any) -> ExactRotary:
    """Set up one model; what it changes is undone by `conversion`. MPT has no phases: nothing is rotated."""
    base = model.base_model
    # The model's own tensor over distances 1 and 0: minus the slope of each head, and zero.
    alibi = base.build_mpt_alibi_tensor(base.num_heads, 2)
    slopes = conversion.alibi_slopes = -alibi[:, 0, 0].float()
    conversion.hook(base, prepare_forward)
    conversion.hook(base, _keep_step)
    conversion.set(base, "build_mpt_alibi_tensor", functools.partial(_step_for_alibi, base))
    for block in base.blocks:
        conversion.replace_forward(block.attn, forward, slopes)
    return ExactRotary(torch.empty(0))


def _keep_step(base: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: the model drops keyword arguments that it does not know."""
    base.longpatch.step = kwargs.pop("longpatch", None)
    if base.longpatch.step is not None:
        kwargs["attention_mask"] = no_mask()
    return args, kwargs


def _step_for_alibi(base: Any, *args: Any, **kwargs: Any) -> Any:
    step, base.longpatch.step = base.longpatch.step, None
    return step


def forward(module: Any, alibi_slopes, hidden_states, position_bias, past_key_values=None, **kwargs):
    """Stands in for MptAttention.forward: [B, n, hidden] to [B, n, hidden], no weights."""
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (states.unflatten(2, (-1, module.head_dim)).transpose(1, 2) for states in qkv.chunk(3, dim=2))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    out, _ = attend(
        module,
        query,
        key,
        value,
        None,
        scaling=module.softmax_scale,
        dropout=module.attn_dropout_p if module.training else 0.0,
        alibi_slopes=alibi_slopes.to(query.device),
        longpatch=position_bias,
    )
    return module.out_proj(out.flatten(2)), None
