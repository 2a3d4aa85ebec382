"""Rotary phases that stay exact at any position.

transformers multiplies positions and frequencies in float32: the phase of a distance of 100 is off by 0.05 rad at
position 1,000,000 and meaningless past 2**24. Here the product is taken in float64, from the very frequencies that the
model was configured with, so that a phase at position 1,000,000,000 is good to 1e-7 rad.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Phase(NamedTuple):
    """cos and sin of rotation angles, `[1 or B, tokens, rotary_dim]` in float32."""

    cos: Tensor
    sin: Tensor


def rotate(states: Tensor, phase: Phase) -> Tensor:
    """Rotate `states` [B, heads, tokens, head_dim] by `phase` in float32; dimensions past rotary_dim stay.

    Pairs are (i, i + rotary_dim / 2), as in Llama.
    """
    cos, sin = phase.cos.unsqueeze(1), phase.sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    x = states[..., :rotary_dim].to(cos.dtype)
    first, second = x.chunk(2, dim=-1)
    rotated = (x * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)
    if rotary_dim == states.shape[-1]:
        return rotated
    return torch.cat((rotated, states[..., rotary_dim:]), dim=-1)


class ExactRotary(nn.Module):
    """Stands in for a model's rotary embedding: same frequencies, same output, exact at any position.

    Frequencies that depend on the length of the input ("dynamic", "longrope") are frozen for `length` tokens, so that
    keys that are already in the cache stay right.
    """

    def __init__(self, original: Any, length: int):
        super().__init__()
        config = original.config
        if original.rope_type == "default":
            frequencies, scaling = original.compute_default_rope_parameters(config)
        elif original.rope_type in ("dynamic", "longrope"):
            frequencies, scaling = ROPE_INIT_FUNCTIONS[original.rope_type](config, seq_len=length)
        else:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[original.rope_type](config)
        # A plain attribute, not a buffer: model.to(bfloat16) would cast a buffer.
        self.frequencies = frequencies.double()
        self.attention_scaling = scaling

    def phase(self, positions: Tensor) -> Phase:
        """Unscaled rotation by `positions` [1 or B, tokens], which may be negative."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angle = positions[..., None].double() * self.frequencies
        angle = torch.cat((angle, angle), dim=-1)
        return Phase(angle.cos().float(), angle.sin().float())

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[1 or B, tokens, rotary_dim]` in the dtype of `x`, with yarn's attention scaling."""
        cos, sin = self.phase(position_ids.to(x.device))
        return (cos * self.attention_scaling).to(x.dtype), (sin * self.attention_scaling).to(x.dtype)
