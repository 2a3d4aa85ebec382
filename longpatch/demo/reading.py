"""One model's way through a text."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..evaluation.perplexity import stream_nll

CHUNK_TOKENS = 512


@dataclass
class Reading:
    """What reading a text gave, token by token and chunk by chunk."""

    label: str
    nll: Tensor  # [tokens], nats
    positions: list[int]  # end of each chunk
    cache_mb: list[float]  # after each chunk
    token_ms: list[float]  # mean over each chunk
    continuation: str = ""


def read(model, ids: Tensor, label: str) -> Reading:
    """Read `ids` [n] with one kept cache and a progress bar."""
    nll, positions, cache_mb, token_ms = [], [], [], []
    with tqdm(total=len(ids) - 1, desc=label, unit="tok", unit_scale=True) as progress:
        for chunk in stream_nll(model, ids, CHUNK_TOKENS):
            nll.append(chunk.nll)
            positions.append(chunk.start + len(chunk.nll))
            cache_mb.append(chunk.cache_bytes / 2**20)
            token_ms.append(1000 * chunk.seconds / len(chunk.nll))
            progress.update(len(chunk.nll))
    return Reading(label, torch.cat(nll), positions, cache_mb, token_ms)
