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
        self.block_tokens = block_tokens
        self.first = 0  # number of the first block that is held: those before it are forgotten
        self.done = 0  # number of the first block that needs another look
        self.keys: Tensor | None = None  # [B, Hkv, blocks, 2 d], room for whole segments

    def crop(self, tokens: int) -> None:
        """Blocks that reach past the first `tokens` tokens are to be looked at anew."""
        self.done = min(self.done, max(self.first, tokens // self.block_tokens))

    def forget(self, tokens: int) -> None:
        """Give up the blocks of the first `tokens` tokens, which are whole segments."""
        gone, self.first = tokens // self.block_tokens - self.first, tokens // self.block_tokens
        self.done = max(self.done, self.first)
        if self.keys is not None:
            self.keys = self.keys[:, :, gone:].clone() if gone < self.keys.shape[2] else None

    def select(self, rows: Tensor) -> "BlockIndex":
        """A copy of some rows."""
        new = BlockIndex(self.block_tokens)
        new.first, new.done = self.first, self.done
        new.keys = None if self.keys is None else self.keys[rows.to(self.keys.device)]
        return new

    def take(self, pieces: Iterable[tuple[int, int, Segment]], blocks: int, whole: int, like: Tensor) -> Tensor:
        """Look at stretches of whole blocks (first token, last + 1, segment), in dtype and on the device of `like`.

        They end with block `blocks - 1`; those before the `whole`-th are whole in every row, so that they will not be
        asked for again. Returns what stands for the blocks from `first` on, [B, Hkv, blocks - first, 2 d].
        """
        size = self.block_tokens
        for start, stop, segment in pieces:
            place = start % SEGMENT_TOKENS
            tokens = (slice(None), slice(None), slice(place, place + stop - start))
            keys = segment.read("keys", tokens, like.dtype).to(like.device).unflatten(2, (-1, size))
            bounds = torch.cat((keys.amax(dim=3), keys.amin(dim=3)), dim=-1)
            held = self._room(blocks, bounds)
            held[:, :, start // size - self.first : stop // size - self.first] = bounds
        self.done = max(self.done, min(blocks, whole))
        assert self.keys is not None
        return self.keys[:, :, : blocks - self.first]

    def _room(self, blocks: int, like: Tensor) -> Tensor:
        of_segment = SEGMENT_TOKENS // self.block_tokens
        held, wanted = (
            0 if self.keys is None else self.keys.shape[2],
            -(-blocks // of_segment) * of_segment - self.first,
        )
        if self.keys is None or held < wanted:
            wider = like.new_zeros((*like.shape[:2], wanted, like.shape[3]))
            if self.keys is not None:
                wider[:, :, :held] = self.keys
            self.keys = wider
        return self.keys
