"""Shifted sparse attention (S2; LongLoRA, arXiv 2309.12307, section 3.2), causal to the last token.

A row is cut into groups that know nothing of each other; half of the heads cut it half a group later, so that what one
half of the heads cannot see the other hands on. The original rolls the shifted heads around the end of the row, where
the first tokens then see the last ones. Here the first half group stands by itself instead.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..changes import SHIFTED, Changes, position_config, rebind_config
from ..convert import unconverted, unwrap
from ..errors import LongpatchError

NAME = "longpatch_shifted"


def shifted_attention(
    query: Tensor, key: Tensor, value: Tensor, group: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of `query` [B, H, n, d] to `key`, `value` [B, Hkv, n, d], for any n; [B, H, n, d].

    With s = 0 for the first half of the heads and s = group // 2 for the others, token i sees token j <= i iff
    `(i - s) // group == (j - s) // group`.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) if repeats > 1 else states for states in (key, value))
    plain = query.shape[1] - query.shape[1] // 2
    shift = min(group // 2, query.shape[2])

    def causal(*states: Tensor) -> Tensor:
        return scaled_dot_product_attention(*states, is_causal=True, scale=scale, dropout_p=dropout)

    def grouped(*states: Tensor) -> Tensor:
        tokens = states[0].shape[2]
        if tokens <= group:
            return causal(*states)
        # Padding comes after all tokens, so that causal attention never sees it. [B * h, groups, group, d]
        cut = (pad(state, (0, 0, 0, -tokens % group)).unflatten(2, (-1, group)).flatten(0, 1) for state in states)
        return causal(*cut).unflatten(0, states[0].shape[:2]).flatten(2, 3)[:, :, :tokens]

    first, second = zip(*((states[:, :plain], states[:, plain:]) for states in (query, key, value)), strict=True)
    # A copy, since a view kept for the backward pass would keep all tokens with it.
    early = causal(*(states[:, :, :shift].contiguous() for states in second))
    late = grouped(*(states[:, :, shift:] for states in second))
    return torch.cat((grouped(*first), torch.cat((early, late), dim=2)), dim=1)


class Shift(Changes):
    """Shifted attention of one model; below a conversion, above an interpolation, whichever came first."""

    def __init__(self, model: Any, group: float):
        super().__init__()
        self.model, self.group = model, group
        self.redo()

    def redo(self) -> None:
        rebind_config(self.model, copy.deepcopy(self.model.config), self)
        self.model.set_attn_implementation(NAME)
        for module in self.model.modules():
            if "layer_idx" in vars(module):
                self.set(module, "shifted_group", self.group)
        self.set(self.model, SHIFTED, self)

    def undo(self) -> None:
        with unconverted(self.model):
            super().undo()


def shift_attention(model: Any, group: float = 0.25) -> Shift:
    """Let a model attend by shifted groups while it is in training mode, and fully otherwise; in place.

    Args:
        group: tokens of a group, or below 1 the share of the row that is one.

    Returns:
        The changes, whose `undo()` takes this back.

    Raises:
        LongpatchError: for models whose attention scaled_dot_product_attention does not compute: those that do not go
            through `AttentionInterface`, and those with learned sinks or a softcap.
    """
    causal = unwrap(model)
    name, reasons = type(causal).__name__, []
    if not isinstance(causal, PreTrainedModel) or not causal._can_set_attn_implementation():
        reasons.append(f"{name} does not use the attention interface of transformers")
    else:
        if not causal._supports_sdpa:
            reasons.append(f"{name} cannot use attn_implementation='sdpa' (learned sinks or a softcap, mostly)")
        if getattr(position_config(causal.config), "attn_logit_softcapping", None) is not None:
            reasons.append(f"{name} has a softcap on its scores (attn_logit_softcapping)")
        if getattr(causal, "longpatch", None) is not None:
            reasons.append("the model is converted to Λ-attention")
    if reasons:
        raise LongpatchError("shift_attention", reasons, "unconverted models that support attn_implementation='sdpa'")
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if SHIFTED in vars(causal):
        vars(causal)[SHIFTED].undo()
    return Shift(causal, group)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any):
    """What transformers calls in each layer: [B, H, n, d] to ([B, n, H, d], None)."""
    sliding = kwargs.get("sliding_window") is not None  # short-sighted as it is
    if not module.training or sliding or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and not attention_mask.diagonal(dim1=-2, dim2=-1)[..., 0].all():
        raise LongpatchError("shift_attention", ["left padding"], "right padding, in training")
    share = module.shifted_group
    group = max(2, math.ceil(share * query.shape[2])) if share < 1 else int(share)
    out = shifted_attention(query, key, value, group, kwargs.get("scaling"), kwargs.get("dropout", 0.0))
    return out.transpose(1, 2).contiguous(), None
