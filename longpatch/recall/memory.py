"""All tokens that one layer may recall: keys and values in segments that come as the text grows."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .blocks import BlockIndex
from .segment import Segment
from .settings import SEGMENT_TOKENS, Recall

FEW = 256  # starts that are fetched one by one


class Memory:
    """Keys, turned back to position 0, and values of tokens, counted from each row's first one after the sinks.

    Tokens come in when they are read, and may be recalled once they have left a query's window. Bytes of a layer::

        2 * batch * key_value_heads * head_dim * bytes_per_number * segments * 4,096

    with `segments = ceil(tokens / 4,096)`, `bytes_per_number` 1 + 4 / head_dim in 8 bits; in block mode, on the device,
    another `2 * batch * key_value_heads * head_dim * 4` for each block. With `max_tokens`, segments wholly older than
    `max_tokens + window + slack` tokens are given up.
    """

    def __init__(self, settings: Recall, window_tokens: int):
        self.settings, self.window_tokens = settings, window_tokens
        self.recalled: Tensor | None = None  # [B, Hq, queries, recalled tokens] of the last forward, -1 where none
        self.reset()

    def reset(self) -> None:
        self.segments: list[Segment | None] = []
        self.lengths: list[int] = []  # tokens of each row
        self.folder: tempfile.TemporaryDirectory | None = None
        self.index = BlockIndex(self.settings.block_tokens) if self.settings.block_tokens > 1 else None

    def append(self, keys: Tensor, values: Tensor, starts: list[int]) -> None:
        """Take in keys, turned back to position 0, and values [B, Hkv, n, d].

        `starts` [B or 1] are the numbers of each row's first new token, negative where the row is still in its
        padding or its sinks.
        """
        count = keys.shape[2]
        starts = starts * len(keys) if len(starts) == 1 else starts
        self.lengths = self.lengths or [0] * len(keys)
        self._forget(min(starts))
        alike = min(starts) == max(starts) and starts[0] >= 0
        for row, start in [(slice(None), starts[0])] if alike else [(slice(r, r + 1), s) for r, s in enumerate(starts)]:
            skipped = min(count, max(0, -start))
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
        while len(self.segments) <= number:
            self.segments.append(None)
        segment = self.segments[number]
        if segment is None:
            rows = len(self.lengths)
            keys, values = (states[:1].expand(rows, -1, -1, -1) for states in (keys, values))
            segment = Segment(keys, values, self.settings.storage, self.settings.bits, self._path(number))
            self.segments[number] = segment
        return segment

    def _path(self, number: int) -> Path | None:
        if self.settings.storage != "disk":
            return None
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="longpatch-", dir=self.settings.folder)
        return Path(self.folder.name) / f"segment-{number}.safetensors"

    def _forget(self, start: int) -> None:
        if self.settings.max_tokens is None:
            return
        oldest = start - self.settings.max_tokens - self.window_tokens
        for number in range(max(0, oldest // SEGMENT_TOKENS)):
            if number < len(self.segments) and self.segments[number] is not None:
                self.segments[number] = None
                if self.folder is not None:
                    (Path(self.folder.name) / f"segment-{number}.safetensors").unlink(missing_ok=True)

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
            segment = self.segments[number]
            if segment is not None:
                yield first, first + count, segment
            first += count

    def representatives(self, blocks: int, whole: int, like: Tensor) -> Tensor:
        """What stands for the first `blocks` blocks [B, Hkv, blocks, 2 d], in dtype and on the device of `like`.

        `whole` of them are whole in every row.
        """
        assert self.index is not None
        first, last = self.index.done * self.index.block_tokens, blocks * self.index.block_tokens - 1
        self.index.take(self.pieces(first, last, SEGMENT_TOKENS), whole, like)
        assert self.index.keys is not None
        return self.index.keys[:, :, :blocks]

    def fetch(self, name: str, starts: Tensor, block_tokens: int, dtype: torch.dtype) -> Tensor:
        """`keys` or `values` [B, Hkv, r, block_tokens, d] of the tokens that begin at `starts` [B, Hkv, r]."""
        home = self.home
        if starts.numel() <= FEW:
            return self._fetch_few(name, starts, block_tokens, dtype)
        starts = starts.to(home)
        number, place = starts // SEGMENT_TOKENS, starts % SEGMENT_TOKENS
        index = place[..., None] + torch.arange(block_tokens, device=home)  # [B, Hkv, r, block_tokens]
        batch = torch.arange(starts.shape[0], device=home)[:, None, None, None]
        head = torch.arange(starts.shape[1], device=home)[None, :, None, None]
        out = None
        numbers = number.unique().tolist()
        for chosen in numbers:
            segment = self.segments[chosen]
            if segment is None:
                continue
            if len(numbers) == 1:
                return segment.read(name, (batch, head, index), dtype)
            b, h, r = (number == chosen).nonzero(as_tuple=True)
            part = segment.read(name, (b[:, None], h[:, None], index[b, h, r]), dtype)
            if out is None:
                out = part.new_zeros((*index.shape, part.shape[-1]))
            out[b, h, r] = part
        assert out is not None
        return out

    def _fetch_few(self, name: str, starts: Tensor, block_tokens: int, dtype: torch.dtype) -> Tensor:
        """The same by slices, one a start: a decode step has no more than that, and a slice costs the least."""
        found = []
        for row, heads in enumerate(starts.tolist()):
            for head, of_head in enumerate(heads):
                for start in of_head:
                    number, place = divmod(start, SEGMENT_TOKENS)
                    segment = self.segments[number] or self._latest  # a forgotten one is only asked for to be masked
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
        return next(segment for segment in reversed(self.segments) if segment is not None)

    @property
    def nbytes(self) -> int:
        """Bytes taken, representatives of blocks included."""
        held = [tensor for segment in self.segments if segment is not None for tensor in segment.tensors.values()]
        if self.index is not None and self.index.keys is not None:
            held.append(self.index.keys)
        return sum(tensor.nbytes for tensor in held)

    def state(self) -> dict[str, Tensor]:
        """All that is remembered, as named tensors, for `restore`."""
        held = {"lengths": torch.tensor(self.lengths, dtype=torch.long)}
        for number, segment in enumerate(self.segments):
            if segment is not None:
                held |= {f"{number}.{name}": tensor for name, tensor in segment.tensors.items()}
        return held

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Remember what `state` of a memory of the same settings held; `device` is the model's."""
        self.reset()
        self.lengths = state["lengths"].tolist()
        for number in sorted({int(name.partition(".")[0]) for name in state if name != "lengths"}):
            tensors = {name: state[f"{number}.{name}"] for name in ("keys", "values")}
            segment = self._segment(number, tensors["keys"].to(device), tensors["values"].to(device))
            for name, held in segment.tensors.items():
                held.copy_(state[f"{number}.{name}"])

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: copies everything, which beams do at each step."""
        if not self.lengths:
            return
        old_folder, old = self.folder, self.segments
        self.segments, self.folder = [None] * len(old), None
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        for number, segment in enumerate(old):
            if segment is not None:
                keys, values = (segment.tensors[name][:1].expand(len(rows), -1, -1, -1) for name in ("keys", "values"))
                new = Segment(keys, values, "device", self.settings.bits, self._path(number))
                new.select(rows, segment)
                self.segments[number] = new
        if self.index is not None:
            self.index.crop(0)
        if old_folder is not None:
            old_folder.cleanup()
