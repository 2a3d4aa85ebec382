"""What stands for a block of tokens while the best blocks are sought."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .segment import Segment
from .settings import SEGMENT_TOKENS


class BlockIndex:
    """Two keys stand for each block: the largest and the smallest value of its keys in every dimension.

    With them `sum_i max(q_i largest_i, q_i smallest_i)` bounds the score of each of the block's tokens from above
    (Quest, arXiv 2406.10774). It holds for rotary models too, since all keys are turned back to position 0 and a query
    sees them all at one distance.
    """

    def __init__(self, block_tokens: int):
        self.block_tokens, self.done = block_tokens, 0  # done: blocks that need no second look
        self.keys: Tensor | None = None  # [B, Hkv, blocks allocated, 2 d]

    def crop(self, tokens: int) -> None:
        """Blocks that reach past the first `tokens` tokens are to be looked at anew."""
        self.done = min(self.done, tokens // self.block_tokens)

    def take(self, pieces: Iterable[tuple[int, int, Segment]], whole: int, like: Tensor) -> None:
        """Look at stretches of whole blocks (first token, last + 1, segment), in dtype and on the device of `like`.

        Blocks before the `whole`-th are whole in every row, so that they will not be asked for again.
        """
        size, stop = self.block_tokens, self.done * self.block_tokens
        for start, stop, segment in pieces:
            place = start % SEGMENT_TOKENS
            tokens = (slice(None), slice(None), slice(place, place + stop - start))
            keys = segment.read("keys", tokens, like.dtype).to(like.device).unflatten(2, (-1, size))
            bounds = torch.cat((keys.amax(dim=3), keys.amin(dim=3)), dim=-1)
            self._room(stop // size, bounds)[:, :, start // size : stop // size] = bounds
        self.done = max(self.done, min(stop // size, whole))

    def _room(self, blocks: int, like: Tensor) -> Tensor:
        held = 0 if self.keys is None else self.keys.shape[2]
        if self.keys is None or held < blocks:
            wider = like.new_zeros((*like.shape[:2], max(blocks, 2 * held, 64), like.shape[3]))
            if self.keys is not None:
                wider[:, :, :held] = self.keys
            self.keys = wider
        return self.keys
