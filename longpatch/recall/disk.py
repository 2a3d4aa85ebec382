"""Tensors in a file that is mapped into memory: a safetensors file that can be written in place."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}
ALIGNMENT = 64


def mapped_tensors(path: Path, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Create a safetensors file of zeros at `path` and return its tensors; what is written to them reaches the file.

    `shapes` gives (shape, dtype) by name. The file is sparse: it takes disk space only where it is written.
    """
    header, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(shapes)  # the header above is one that safetensors reads
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        start, stop = header[name]["data_offsets"]
        mapped = np.memmap(path, np.uint8, "r+", 8 + len(text) + start, (stop - start,))
        tensors[name] = torch.from_numpy(mapped).view(dtype).view(shape)
    return tensors
