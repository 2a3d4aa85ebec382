"""All tokens that one layer may recall: keys and values in segments that come as the text grows."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LongpatchError
from .blocks import BlockIndex
from .lookup import Lookup
from .segment import Segment
from .settings import SEGMENT_TOKENS, Recall

FEW = 256  # starts that are fetched one by one


class Memory:
    """Keys, turned back to position 0, and values of tokens, counted from each row's first one after the sinks.

    Tokens come in when they are read, and may be recalled once they have left a query's window. Bytes of a layer::

        2 * batch * key_value_heads * head_dim * bytes_per_number * 4,096 * segments

    with `segments = ceil(tokens / 4,096)`, `bytes_per_number` 1 + 4 / head_dim in 8 bits. Block mode keeps, on the
    device, another `2 * batch * key_value_heads * head_dim * 4` for each block of segments with tokens that left the
    window. With `max_tokens`, segments wholly older than `max_tokens + window + slack + n` tokens are given up, or
    never written, where the last `n` tokens of a forward recall.
    """

    def __init__(self, settings: Recall, window_tokens: int):
        self.settings, self.window_tokens = settings, window_tokens  # the slack counts as window
        self.reset()

    def reset(self) -> None:
        self.segments: dict[int, Segment] = {}
        self.oldest = 0  # tokens before this one are forgotten: whole segments
        self.lengths: list[int] = []  # tokens of each row
        self.folder: tempfile.TemporaryDirectory | None = None
        self.index = BlockIndex(self.settings.block_tokens) if self.settings.block_tokens > 1 else None
        self.found: tuple[Tensor, Lookup] | None = None  # tokens or blocks [B, Hkv, g, q, k] of the last forward

    def append(self, keys: Tensor, values: Tensor, starts: list[int]) -> None:
        """Take in keys, turned back to position 0, and values [B, Hkv, n, d].

        `starts` [B or 1] are the numbers of each row's first new token, negative where the row is still in its
        padding or its sinks.
        """
        count = keys.shape[2]
        starts = starts * len(keys) if len(starts) == 1 else starts
        self.lengths = self.lengths or [0] * len(keys)
        if self.settings.max_tokens is not None:
            asking = count if self.settings.queries is None else min(self.settings.queries, count)
            self._forget(min(starts) + count - asking - self.window_tokens - self.settings.max_tokens)
        alike = min(starts) == max(starts) and starts[0] >= 0
        for row, start in [(slice(None), starts[0])] if alike else [(slice(r, r + 1), s) for r, s in enumerate(starts)]:
            skipped = min(count, max(0, self.oldest - start))
            self._write(row, start + skipped, keys[row, :, skipped:], values[row, :, skipped:])
        self.lengths = [max(0, start + count) for start in starts]
        if self.index is not None:
            self.index.crop(max(0, min(starts)))

    def _write(self, rows: slice, start: int, keys: Tensor, values: Tensor) -> None:
        done = 0
        while done < keys.shape[2]:
            number, place = divmod(start + done, SEGMENT_TOKENS)
            count = min(keys.shape[2] - done, SEGMENT_TOKENS - place)
            self._segment(number, keys, values).write(
                rows, place, keys[:, :, done : done + count], values[:, :, done : done + count]
            )
            done += count

    def _segment(self, number: int, keys: Tensor, values: Tensor) -> Segment:
        if number not in self.segments:
            kept = self.settings.storage, self.settings.bits, self._path(number)
            self.segments[number] = Segment.create(keys, values, len(self.lengths), *kept)
        return self.segments[number]

    def _path(self, number: int) -> Path | None:
        if self.settings.storage != "disk":
            return None
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="longpatch-", dir=self.settings.folder)
        return Path(self.folder.name) / f"segment-{number}.safetensors"

    def _forget(self, tokens: int) -> None:
        """Give up segments wholly among the first `tokens` tokens."""
        oldest = tokens // SEGMENT_TOKENS * SEGMENT_TOKENS
        if oldest <= self.oldest:
            return
        self.oldest = oldest
        for number in [number for number in self.segments if number < oldest // SEGMENT_TOKENS]:
            del self.segments[number]
            if self.folder is not None:
                (Path(self.folder.name) / f"segment-{number}.safetensors").unlink()
        if self.index is not None:
            self.index.forget(oldest)

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens of every row."""
        self.lengths = [max(0, length - count) for length in self.lengths]
        if self.index is not None and self.lengths:
            self.index.crop(min(self.lengths))

    def pieces(self, first: int, last: int, longest: int):
        """Stretches of tokens `first` to `last` (inclusive) as (start, stop, segment), none longer than `longest`."""
        while first <= last:
            number, place = divmod(first, SEGMENT_TOKENS)
            count = min(last + 1 - first, SEGMENT_TOKENS - place, longest)
            segment = self.segments.get(number)
            if segment is not None:
                yield first, first + count, segment
            first += count

    def representatives(self, blocks: int, whole: int, like: Tensor) -> tuple[int, Tensor]:
        """The first block that is not forgotten, and what stands for it and those up to `blocks`, [B, Hkv, b, 2 d].

        In dtype and on the device of `like`; the first `whole` blocks are whole in every row.
        """
        assert self.index is not None
        blocks = max(blocks, self.index.first + 1)
        first, last = self.index.done * self.index.block_tokens, blocks * self.index.block_tokens - 1
        keys = self.index.take(self.pieces(first, last, SEGMENT_TOKENS), blocks, whole, like)
        return self.index.first, keys

    def fetch(self, name: str, starts: Tensor, block_tokens: int, dtype: torch.dtype) -> Tensor:
        """`keys` or `values` [B, Hkv, r, block_tokens, d] of the tokens that begin at `starts` [B, Hkv, r].

        What is forgotten comes back as any numbers: it is only asked for to be masked.
        """
        home = self.home
        if starts.numel() <= FEW:
            return self._fetch_few(name, starts, block_tokens, dtype)
        starts = starts.to(home)
        number, place = starts // SEGMENT_TOKENS, starts % SEGMENT_TOKENS
        index = place[..., None] + torch.arange(block_tokens, device=home)  # [B, Hkv, r, block_tokens]
        batch = torch.arange(starts.shape[0], device=home)[:, None, None, None]
        head = torch.arange(starts.shape[1], device=home)[None, :, None, None]
        numbers = [chosen for chosen in number.unique().tolist() if chosen in self.segments]
        if len(numbers) == 1:
            return self.segments[numbers[0]].read(name, (batch, head, index), dtype)
        out = torch.zeros((*index.shape, self._latest.tensors[name].shape[-1]), dtype=dtype, device=home)
        for chosen in numbers:
            b, h, r = (number == chosen).nonzero(as_tuple=True)
            out[b, h, r] = self.segments[chosen].read(name, (b[:, None], h[:, None], index[b, h, r]), dtype)
        return out

    def _fetch_few(self, name: str, starts: Tensor, block_tokens: int, dtype: torch.dtype) -> Tensor:
        """The same by slices, one a start: a decode step has no more than that, and a slice costs the least."""
        found = []
        for row, heads in enumerate(starts.tolist()):
            for head, of_head in enumerate(heads):
                for start in of_head:
                    number, place = divmod(start, SEGMENT_TOKENS)
                    segment = self.segments.get(number, self._latest)
                    found.append(segment.read(name, (row, head, slice(place, place + block_tokens)), dtype))
        return torch.stack(found).view(*starts.shape, block_tokens, -1)

    @property
    def home(self) -> torch.device:
        """The device that keys and values are read on."""
        return self._latest.tensors["keys"].device

    @property
    def key_heads(self) -> int:
        return self._latest.tensors["keys"].shape[1]

    @property
    def _latest(self) -> Segment:
        return self.segments[max(self.segments)]

    @property
    def nbytes(self) -> int:
        """Bytes taken, representatives of blocks included."""
        held = [tensor for segment in self.segments.values() for tensor in segment.tensors.values()]
        if self.index is not None and self.index.keys is not None:
            held.append(self.index.keys)
        return sum(tensor.nbytes for tensor in held)

    def state(self) -> dict[str, Tensor]:
        """All that is remembered, as named tensors, for `restore`."""
        held = {"lengths": torch.tensor(self.lengths, dtype=torch.long)}
        for number, segment in self.segments.items():
            held |= {f"{number}.{name}": tensor for name, tensor in segment.settled().items()}
        return held

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Remember what `state` of a memory of the same settings held; `device` is the model's."""
        self.reset()
        self.lengths = state["lengths"].tolist()
        numbers = {int(name.partition(".")[0]) for name in state if name != "lengths"}
        self._forget(min(numbers, default=0) * SEGMENT_TOKENS)
        for number in sorted(numbers):
            segment = self._segment(number, *(state[f"{number}.{name}"].to(device) for name in ("keys", "values")))
            for name, held in segment.tensors.items():
                held.copy_(state[f"{number}.{name}"])

    def select(self, rows: Tensor) -> "Memory":
        """Another memory of some rows, in files of its own: copies everything, which beams do at each step."""
        new = Memory(self.settings, self.window_tokens)
        if not self.lengths:
            return new
        new.oldest, new.lengths = self.oldest, [self.lengths[row] for row in rows.tolist()]
        new.segments = {number: segment.select(rows, new._path(number)) for number, segment in self.segments.items()}
        new.index = None if self.index is None else self.index.select(rows)
        if self.found is not None:
            chosen, lookup = self.found
            new.found = chosen[rows.to(chosen.device)], lookup.select(rows)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memory":
        return self.select(torch.arange(len(self.lengths)))

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is not None:
            raise LongpatchError("pickle", ["the files of storage='disk' go with their cache"], "copy.deepcopy(cache)")
        return vars(self)
