"""One preallocated stretch of remembered keys and values: where it lies and in how many bits."""

from pathlib import Path

import torch
from torch import Tensor

from .disk import mapped_tensors
from .settings import SEGMENT_TOKENS

LEVELS = 127


class Segment:
    """Keys and values `[B, Hkv, SEGMENT_TOKENS, d]` on the model's device, the CPU or the disk.

    In 8 bits each token and head has a scale, its largest absolute value / 127, kept in float32.
    """

    def __init__(self, keys: Tensor, values: Tensor, storage: str, bits: int | None, path: Path | None):
        """`keys` and `values` [B, Hkv, n, d] tell shapes, dtype and device; they are not stored."""
        shapes = {}
        for name, states in (("keys", keys), ("values", values)):
            shape = (*states.shape[:2], SEGMENT_TOKENS, states.shape[3])
            shapes[name] = (shape, torch.int8 if bits else states.dtype)
            if bits:
                shapes[f"{name}_scale"] = ((*shape[:3], 1), torch.float32)
        if path is not None:
            self.tensors = mapped_tensors(path, shapes)
        else:
            device = keys.device if storage == "device" else torch.device("cpu")
            pin = storage == "cpu" and keys.is_cuda
            self.tensors = {
                name: torch.zeros(shape, dtype=dtype, device=device, pin_memory=pin)
                for name, (shape, dtype) in shapes.items()
            }

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

    def read(self, name: str, index, dtype: torch.dtype) -> Tensor:
        """`keys` or `values` at `index` in `dtype`, on the device where the segment lies."""
        held = self.tensors[name][index].to(dtype)
        return held * self.tensors[f"{name}_scale"][index].to(dtype) if f"{name}_scale" in self.tensors else held

    def select(self, rows: Tensor, other: "Segment") -> None:
        """Take over rows of another segment."""
        for name, held in self.tensors.items():
            held.copy_(other.tensors[name][rows.to(other.tensors[name].device)])
