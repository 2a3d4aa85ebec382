"""Where each row's text begins: left padding, read off the attention mask once per forward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LongpatchError


@dataclass(frozen=True)
class Padding:
    """`first_valid` [B] is the column of each row's first unmasked token, None where every row begins at column 0.

    `right` tells that some row has ended in masked columns, after which no token may follow.
    """

    first_valid: Tensor | None = None
    right: bool = False


def read_padding(mask: Tensor | None, positions: Tensor | None, known: Padding, past: int, count: int) -> Padding:
    """Padding after `count` new tokens that follow `past` cached ones.

    Args:
        mask: [B, past + count], 0 = masked; None = nothing masked.
        positions: [1 or B, count] position ids as the caller gave them, or None.
        known: padding of the cached tokens.

    Raises:
        LongpatchError: masks of another length, masked gaps between tokens, packed rows.
    """
    if known.right:
        raise LongpatchError(
            "forward",
            ["the cached tokens end in right padding, so the new ones would follow a masked gap"],
            "left padding (tokenizer.padding_side = 'left') wherever tokens follow",
        )
    if mask is None:
        _refuse_packed(positions, None)
        return known
    if mask.shape[1] != past + count:
        shape, cached = list(mask.shape), f"{past} cached + {count} new tokens"
        raise LongpatchError(
            "forward",
            [f"attention_mask has shape {shape}, the model has {cached}"],
            f"[batch, {past + count}], 1 = token",
        )
    if past and count == 1 and ((mask.is_cuda and known.first_valid is None) or mask[:, -1].all()):
        return known  # decoding; on a GPU even this look would make the CPU wait
    new = mask[:, past:].bool()
    _refuse_packed(positions, new)
    if known.first_valid is None:
        started = torch.full_like(new[:, 0], past > 0)
        column = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    else:
        started, column = known.first_valid < past, known.first_valid
    leading = (new.cumsum(dim=1) == 0).sum(dim=1)
    first_valid = torch.where(started, column, past + leading)
    before = torch.cat((started[:, None], new[:, :-1]), dim=1)
    rises = (new & ~before).sum(dim=1)
    gap = rises > (~started).long()
    right = ~new[:, -1] & (first_valid < past + count)
    has_gap, is_right, is_left = torch.stack((gap.any(), right.any(), (first_valid > 0).any())).tolist()
    if has_gap:
        raise LongpatchError(
            "forward",
            ["attention_mask masks columns between tokens of one row"],
            "left padding, or right padding at the end",
        )
    return Padding(first_valid if is_left else None, is_right)


def _refuse_packed(positions: Tensor | None, valid: Tensor | None):
    if positions is None or positions.shape[-1] < 2:
        return
    restarts = positions.diff(dim=-1) < 1
    if valid is not None:
        restarts = restarts & valid[:, 1:] & valid[:, :-1]
    if restarts.any():
        raise LongpatchError(
            "forward",
            ["position_ids restart within a row (packed sequences)"],
            "one text per row, position_ids that grow",
        )
