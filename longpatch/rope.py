"""Rotary phases that stay exact at any position.

transformers multiplies positions and frequencies in float32: the phase of a distance of 100 is off by 0.05 rad at
position 1,000,000 and meaningless past 2**24. Here the product is taken in float64, from the very frequencies that the
model was configured with, so that a phase at position 1,000,000,000 is good to 1e-7 rad.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Phase(NamedTuple):
    """cos and sin of rotation angles, `[1 or B, tokens, rotary_dim]` in float32.

    Pairs of dimensions are (i, i + rotary_dim / 2), as in Llama, or (0, 1), (2, 3), ... where `interleaved`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def scaled(self, factor: float) -> "Phase":
        return self._replace(cos=self.cos * factor, sin=self.sin * factor)


def rotate(states: Tensor, phase: Phase) -> Tensor:
    """Rotate `states` [B, heads, tokens, head_dim] by `phase` in float32; dimensions past rotary_dim stay."""
    cos, sin = phase.cos.unsqueeze(1), phase.sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    if rotary_dim == 0:
        return states
    x = states if rotary_dim == states.shape[-1] else states[..., :rotary_dim]
    x = x.to(cos.dtype)
    rotated = (x * cos + _quarter(x, phase.interleaved) * sin).to(states.dtype)
    if rotary_dim == states.shape[-1]:
        return rotated
    return torch.cat((rotated, states[..., rotary_dim:]), dim=-1)


def quarter_turn(states: Tensor, phase: Phase) -> Tensor:
    """`states` rotated by pi / 2, in the dimensions and pairs that `phase` turns."""
    rotary_dim = phase.cos.shape[-1]
    turned = _quarter(states[..., :rotary_dim], phase.interleaved)
    return torch.cat((turned, states[..., rotary_dim:]), dim=-1) if rotary_dim < states.shape[-1] else turned


def _quarter(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


# How families lay out the angles [..., n] of n pairs for their own rotation.
def halves(angle: Tensor) -> Tensor:
    return torch.cat((angle, angle), dim=-1)


def pairs(angle: Tensor) -> Tensor:
    return angle.repeat_interleave(2, dim=-1)


def once(angle: Tensor) -> Tensor:
    return angle


class ExactRotary(nn.Module):
    """Stands in for a model's rotary embedding: same frequencies, same output, exact at any position.

    Args:
        frequencies: [n] in radians per token, one for each pair of dimensions; n = 0 turns nothing.
        attention_scaling: factor on the cos and sin of `forward`, as yarn has it.
        interleaved: which dimensions form a pair, see `Phase`.
        layout: how `forward` lays out its angles.
    """

    def __init__(
        self,
        frequencies: Tensor,
        attention_scaling: float = 1.0,
        interleaved: bool = False,
        layout: Callable[[Tensor], Tensor] = halves,
    ):
        super().__init__()
        # Plain attributes, not buffers: model.to(bfloat16) would cast buffers. One number for each dimension as `phase`
        # has it, and as `forward` does.
        self.frequencies = frequencies.double()
        self.turned, self.shown = (pairs if interleaved else halves)(self.frequencies), layout(self.frequencies)
        self.attention_scaling, self.interleaved = attention_scaling, interleaved

    def phase(self, positions: Tensor) -> Phase:
        """Unscaled rotation by `positions` [1 or B, tokens], which may be negative."""
        self._follow(positions)
        angle = positions[..., None] * self.turned
        return Phase(angle.cos().float(), angle.sin().float(), self.interleaved)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[1 or B, tokens, rotary_dim]` in the dtype of `x`, with yarn's attention scaling."""
        self._follow(x)
        angle = position_ids.to(x.device)[..., None] * self.shown
        cos, sin = angle.cos(), angle.sin()
        if self.attention_scaling != 1:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _follow(self, states: Tensor) -> None:
        if self.shown.device != states.device:
            for name in ("frequencies", "turned", "shown"):
                setattr(self, name, getattr(self, name).to(states.device))


class RotaryByLayerType(nn.Module):
    """Stands in for a rotary embedding whose phases differ between layer types, as in Gemma 3."""

    def __init__(self, rotaries: dict[str, ExactRotary]):
        super().__init__()
        self.rotaries = rotaries

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        return self.rotaries[layer_type](x, position_ids)


def exact_rotary(original: Any, length: int, interleaved: bool = False) -> tuple[nn.Module, ExactRotary]:
    """What stands in for the rotary embedding `original`, and the part of it that full-attention layers use.

    Frequencies that depend on the length of the input ("dynamic", "longrope") are frozen for `length` tokens, so that
    keys that are already in the cache stay right.
    """
    if not isinstance(original.rope_type, dict):
        rotary = _exact(original, length, interleaved, original.rope_type)
        return rotary, rotary
    rotaries = {
        layer_type: _exact(original, length, interleaved, rope_type, layer_type=layer_type)
        for layer_type, rope_type in original.rope_type.items()
    }
    return RotaryByLayerType(rotaries), rotaries.get("full_attention") or next(iter(rotaries.values()))


def _exact(original: Any, length: int, interleaved: bool, rope_type: str, **layer_type: str) -> ExactRotary:
    if rope_type == "default":
        frequencies, scaling = original.compute_default_rope_parameters(original.config, **layer_type)
    elif rope_type in ("dynamic", "longrope"):
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](original.config, seq_len=length, **layer_type)
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](original.config, **layer_type)
    layout = _layout(original, frequencies, **layer_type)
    return ExactRotary(frequencies, scaling, interleaved, layout)


def _layout(original: Any, frequencies: Tensor, **layer_type: str) -> Callable[[Tensor], Tensor]:
    """The layout whose cos at position 1 is nearest to the original's."""
    probe = copy.deepcopy(original).cpu()  # some types of rotary embedding change when they are called
    cos, _ = probe(torch.zeros(()), torch.ones(1, 1, dtype=torch.long), **layer_type)

    def error(layout):
        ours = layout(frequencies.cpu()).cos()
        return (ours - cos).abs().sum() if ours.shape[-1] == cos.shape[-1] else torch.inf

    return min((halves, pairs, once), key=error)
