"""Rows become a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .rows import IGNORED


def pad_right(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`input_ids` and `labels` [B, n], padded on the right.

    No mask: with causal attention no token sees the padding after it, and padding is no label.
    """
    ids = pad_sequence([torch.as_tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = pad_sequence([torch.as_tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids, "labels": labels}
