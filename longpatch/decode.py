"""One new token a row: the sinks are turned to where it sees them, and attention is one call over one buffer.

`q . R(D - i) k_0` is also the score of an unturned query against a sink that stands at position `i - D`. With one query
a row it is cheaper to turn the few sinks than to score two segments and merge them.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longpatch_kernels import lambda_attention

from .config import LambdaConfig
from .rope import ExactRotary


@dataclass(frozen=True)
class Decode:
    """What all layers share while one token a row follows `past` cached ones.

    The same shapes and constants for every position when `past` is a tensor: one graph for `torch.compile`.
    """

    place: int | Tensor  # in the ring, of the new token
    held: int  # ring entries that are read
    sinks: int  # sinks that are read: none while all of them are inside every row's window
    bias: Tensor | None  # [1 or B, 1, 1, sinks + held], 0 or -inf; None: everything that is read is seen
    cos: Tensor | None  # [1 or B, 1, 1, rotary_dim], of R(position - distance), for the sinks; None if there are none
    sin: Tensor | None
    options: dict[str, Any] | None = None  # of `lambda_attention`, where it is the faster way

    @classmethod
    def create(
        cls,
        config: LambdaConfig,
        rotary: ExactRotary,
        positions: Tensor,
        past: int | Tensor,
        written: int,
        first_valid: Tensor | None,
        dtype: torch.dtype,
        many_keys: float = torch.inf,
    ) -> "Decode":
        """`positions` [1 or B, 1]; `written` is the most tokens the ring has held, unused where `past` is a tensor.

        A row that reads `many_keys` reads them by `lambda_attention`.
        """
        window, ring = config.local_branch, config.local_branch + config.slack
        if isinstance(past, Tensor):
            held, sinks = ring, config.global_branch
            bias = _any_bias(config, past, held, sinks, first_valid, dtype, positions.device)
        else:
            held = ring if max(written, past + 1) > ring else past + 1
            sinks = config.global_branch if past >= window else 0
            if first_valid is not None:
                bias = _any_bias(config, past, held, sinks, first_valid, dtype, positions.device)
            else:
                bias = _plain_bias(config, past, held, sinks, dtype, positions.device)
        options = None
        if not isinstance(past, Tensor) and held >= many_keys:
            options = _options(config, past, held, sinks, first_valid, positions.device)
        if not sinks:
            return cls(past % ring, held, sinks, bias, None, None, options)
        phase = rotary.phase(positions[:, None] - config.distance)
        return cls(past % ring, held, sinks, bias, phase.cos, phase.sin, options)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Query [B, Hq, 1, d] over what `LambdaLayer.update` returned, [B, Hkv, sinks + held, d]: out [B, 1, Hq, d].

        `softcap` and learned `sink_logits` [Hq] as in `attention.attend`.
        """
        if self.options is not None and softcap is None and sink_logits is None and query.device.type == "cpu":
            return self._attend(query, key, value, scale).transpose(1, 2)
        batch, heads, _, dim = query.shape
        grouped = query.reshape(batch, key.shape[1], -1, dim)  # heads that share a key head are rows of one matrix
        if softcap is None and sink_logits is None:
            out = scaled_dot_product_attention(grouped, key, value, attn_mask=self.bias, scale=scale)
        else:
            scores = grouped @ key.mT * (dim**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if self.bias is not None:
                scores = scores + self.bias
            if sink_logits is not None:
                column = sink_logits.to(scores.dtype).reshape(1, key.shape[1], -1, 1).expand(batch, -1, -1, -1)
                scores = torch.cat((scores, column), dim=-1)
            out = scores.softmax(dim=-1)[..., : key.shape[2]] @ value
        return out.reshape(batch, 1, heads, dim)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """The same by `lambda_attention`, [B, Hq, 1, d]: the sinks are far keys, turned to where they are seen."""
        assert self.options is not None
        far, sinks = {}, self.sinks
        if sinks:
            far = {"query_far": query, "key_far": key[:, :, :sinks], "value_far": value[:, :, :sinks]}
            key, value = key[:, :, sinks:], value[:, :, sinks:]
        return lambda_attention(query, key, value, scale=scale, **far, **self.options)[0]

    def to(self, device, non_blocking: bool = False) -> "Decode":
        """The same on another device, as `Step.to`."""
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **{name: part.to(device, non_blocking=non_blocking) for name, part in tensors.items()})


def _options(config: LambdaConfig, past: int, held: int, sinks: int, first_valid, device) -> dict[str, Any]:
    """Of `lambda_attention` over the ring, whose positions count from the oldest entry."""
    ring, oldest = config.local_branch + config.slack, past + 1 - held
    options: dict[str, Any] = {"window": config.local_branch, "ring_start": (past + 1) % ring if held == ring else 0}
    if first_valid is not None:
        options["first_valid"] = first_valid - oldest
    if sinks:
        positions = torch.arange(-oldest, sinks - oldest, device=device)
        options["far_positions"] = positions if first_valid is None else first_valid[:, None] + positions
    return options


def _any_bias(config: LambdaConfig, past: int | Tensor, held: int, sinks: int, first_valid, dtype, device) -> Tensor:
    """Padding, and counts that are tensors."""
    window, ring = config.local_branch, config.local_branch + config.slack
    age = (past - torch.arange(held, device=device)) % ring
    start = torch.zeros(1, 1, dtype=torch.long, device=device) if first_valid is None else first_valid[:, None]
    # A token always sees itself, as padding too: a row that sees nothing would be NaN.
    hidden = ((age >= window) | (past - age < start)) & (age > 0)
    if sinks:
        far = past - start - torch.arange(sinks, device=device) < window
        hidden = torch.cat((far, hidden), dim=1)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return bias[:, None, None]


@functools.lru_cache(maxsize=32)
def _hidden_run(hidden: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Seen, hidden, seen, [1, 1, 1, width + hidden + width]: every mask with one run of hidden keys is a view of it."""
    with torch.inference_mode(False):  # what is kept must serve steps with gradients too
        run = torch.zeros(1, 1, 1, 2 * width + hidden, dtype=dtype, device=device)
        run.narrow(3, width, hidden).fill_(-torch.inf)
    return run


def _plain_bias(config: LambdaConfig, past: int, held: int, sinks: int, dtype, device) -> Tensor | None:
    """The same in fewer operations: what is hidden are the sinks still in the window, and the slack."""
    window, ring = config.local_branch, config.local_branch + config.slack
    if past < window and held <= past + 1:
        return None
    first = past % ring + 1 if held == ring else 0  # the oldest entry
    if held == ring and past - window + 1 >= sinks and first + config.slack <= ring:
        width = sinks + ring
        return _hidden_run(config.slack, width, dtype, device).narrow(3, width - sinks - first, width)
    bias = torch.zeros(1, 1, 1, sinks + held, dtype=dtype, device=device)
    if past - window + 1 < sinks:
        near = past - window + 1
        bias.narrow(3, near, sinks - near).fill_(-torch.inf)
    for entry, stop in ((first, first + held - window), (first - ring, first + held - window - ring)):
        entry, stop = max(0, entry), min(held, stop)
        if entry < stop:
            bias.narrow(3, sinks + entry, stop - entry).fill_(-torch.inf)
    return bias
