"""One preallocated stretch of remembered keys and values: where it lies and in how many bits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .disk import mapped_tensors
from .settings import SEGMENT_TOKENS

LEVELS = 127


class Segment:
    """Keys and values `[B, Hkv, SEGMENT_TOKENS, d]` on the model's device, the CPU or the disk.

    In 8 bits each token and head has a scale, its largest absolute value / 127, kept in float32.
    """

    def __init__(self, shapes: dict[str, Any], device: torch.device, pin: bool, path: Path | None):
        """Zeros by name of (shape, dtype); in a file at `path`, or on `device`, pinned if `pin`."""
        self.written: torch.cuda.Event | None = None  # after the copies from a GPU that may still be under way
        self.tensors = (
            {
                name: torch.zeros(shape, dtype=dtype, device=device, pin_memory=pin)
                for name, (shape, dtype) in shapes.items()
            }
            if path is None
            else mapped_tensors(path, shapes)
        )

    @classmethod
    def create(
        cls, keys: Tensor, values: Tensor, rows: int, storage: str, bits: int | None, path: Path | None
    ) -> "Segment":
        """For `rows` rows of the shapes, dtype and device of `keys` and `values` [B, Hkv, n, d]."""
        shapes = {}
        for name, states in (("keys", keys), ("values", values)):
            shape = (rows, states.shape[1], SEGMENT_TOKENS, states.shape[3])
            shapes[name] = (shape, torch.int8 if bits else states.dtype)
            if bits:
                shapes[f"{name}_scale"] = ((*shape[:3], 1), torch.float32)
        device = keys.device if storage == "device" else torch.device("cpu")
        return cls(shapes, device, storage == "cpu" and keys.is_cuda, path)

    def write(self, rows: slice, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [rows, Hkv, n, d] at `start` and after; from a GPU to pinned memory without waiting."""
        place = (rows, slice(None), slice(start, start + keys.shape[2]))
        for name, states in (("keys", keys), ("values", values)):
            held = self.tensors[name]
            if held.dtype == torch.int8:
                scale = (states.float().abs().amax(dim=-1, keepdim=True) / LEVELS).clamp_min(1e-12)
                self.tensors[f"{name}_scale"][place].copy_(scale, non_blocking=True)
                states = (states.float() / scale).round().to(torch.int8)
            held[place].copy_(states, non_blocking=True)
        if keys.is_cuda and not self.tensors["keys"].is_cuda:
            self.written = torch.cuda.Event()
            self.written.record(torch.cuda.current_stream(keys.device))

    def settled(self) -> dict[str, Tensor]:
        """The tensors by name, once all that was written to them has arrived."""
        if self.written is not None:
            self.written.synchronize()
            self.written = None
        return self.tensors

    def read(self, name: str, index, dtype: torch.dtype) -> Tensor:
        """`keys` or `values` at `index` in `dtype`, on the device where the segment lies."""
        tensors = self.settled()
        held = tensors[name][index].to(dtype)
        return held * tensors[f"{name}_scale"][index].to(dtype) if f"{name}_scale" in tensors else held

    def select(self, rows: Tensor, path: Path | None) -> "Segment":
        """A copy of some rows, kept where this one is."""
        tensors = self.settled()
        held = tensors["keys"]
        shapes = {name: ((len(rows), *each.shape[1:]), each.dtype) for name, each in tensors.items()}
        new = Segment(shapes, held.device, held.is_pinned(), path)
        for name, each in new.tensors.items():
            torch.index_select(tensors[name], 0, rows.to(held.device), out=each)
        return new
