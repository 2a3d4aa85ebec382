"""What stands for a block of tokens while the best blocks are sought."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .settings import SEGMENT_TOKENS

if TYPE_CHECKING:
    from .memory import Memory


class BlockIndex:
    """Two keys stand for each block: the largest and the smallest value of its keys in every dimension.

    With them `sum_i max(q_i largest_i, q_i smallest_i)` bounds the score of each of the block's tokens from above
    (Quest, arXiv 2406.10774). It holds for rotary models too, since all keys are turned back to position 0 and a query
    sees them all at one distance.
    """

    def __init__(self, memory: "Memory"):
        self.memory, self.done = memory, 0
        self.keys: Tensor | None = None  # [B, Hkv, blocks allocated, 2 d]

    def crop(self, tokens: int) -> None:
        """Blocks that reach past the first `tokens` tokens are to be looked at anew."""
        self.done = min(self.done, tokens // self.memory.settings.block_tokens)

    def until(self, blocks: int, whole: int, like: Tensor) -> Tensor:
        """Representatives [B, Hkv, blocks, 2 d] of the first `blocks` blocks; `whole` of them are whole in every row.

        They come in dtype and on the device of `like`.
        """
        size = self.memory.settings.block_tokens
        for start, stop, segment in self.memory.pieces(self.done * size, blocks * size - 1, SEGMENT_TOKENS):
            place = start % SEGMENT_TOKENS
            tokens = (slice(None), slice(None), slice(place, place + stop - start))
            keys = segment.read("keys", tokens, like.dtype).to(like.device).unflatten(2, (-1, size))
            bounds = torch.cat((keys.amax(dim=3), keys.amin(dim=3)), dim=-1)
            self._room(stop // size, bounds)[:, :, start // size : stop // size] = bounds
        self.done = max(self.done, min(blocks, whole))
        assert self.keys is not None
        return self.keys[:, :, :blocks]

    def _room(self, blocks: int, like: Tensor) -> Tensor:
        held = 0 if self.keys is None else self.keys.shape[2]
        if self.keys is None or held < blocks:
            wider = like.new_zeros((*like.shape[:2], max(blocks, 2 * held, 64), like.shape[3]))
            if self.keys is not None:
                wider[:, :, :held] = self.keys
            self.keys = wider
        return self.keys
