"""Which part of a long text a model gets to see when its cache is built anew: the sinks, and the latest tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LongpatchError


class Visible(NamedTuple):
    """Part of a text, left-padded to the longest row.

    Attributes:
        ids: [rows, w].
        mask: [rows, w], 0 = padding; None = no row is padded.
        left_out: [rows]: tokens between a row's sinks and its latest tokens.
    """

    ids: Tensor
    mask: Tensor | None
    left_out: Tensor


def row_starts(call: str, mask: Tensor) -> Tensor:
    """First token [rows] of each row under `mask` [rows, n].

    Raises:
        LongpatchError: where a masked token follows one that is not, or a row has none.
    """
    there = mask != 0
    if not there[:, -1:].all() or (there[:, :-1] & ~there[:, 1:]).any():
        raise LongpatchError(
            call, ["attention_mask masks tokens after the first of a row, or all of them"], "left padding"
        )
    return (~there).sum(dim=1)


def sinks_of(model: Any) -> int:
    """First tokens of a text that stay visible: those of a converted model, else 0."""
    conversion = getattr(model, "longpatch", None)
    return 0 if conversion is None else conversion.config.global_branch


def visible(ids: Tensor, mask: Tensor | None, tokens: int, sinks: int) -> Visible:
    """Each row's first `sinks` tokens and last `tokens` tokens, side by side; all of it where that is all there is.

    Args:
        ids: [rows, n], mask: [rows, n] with 0 = left padding, or None.
    """
    rows, count = ids.shape
    room = sinks + tokens
    first = torch.zeros(rows, dtype=torch.long, device=ids.device) if mask is None else (mask == 0).sum(dim=1)
    length = count - first
    kept = length.clamp_max(room)
    left_out = length - kept
    if not left_out.any():
        start = int(first.min()) if rows else 0
        kept_mask = None if mask is None or mask[:, start:].all() else mask[:, start:]
        return Visible(ids[:, start:], kept_mask, left_out)
    width = int(kept.max())
    place = torch.arange(width, device=ids.device) - (width - kept)[:, None]  # within the row; < 0 = padding
    column = first[:, None] + place + torch.where(place >= sinks, left_out[:, None], 0)
    there = place >= 0
    return Visible(ids.gather(1, column.clamp_min(0)), None if there.all() else there.long(), left_out)
