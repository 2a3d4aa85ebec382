"""Tile sizes, warps and pipeline stages of the Triton kernels, by chip, number size and head size."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..inputs import LambdaInputs

DECODE_ROWS = 64  # query rows that one decode tile holds at most
LARGEST_MERGE = 64  # partial results that one row of a split decode merges at most


class Config(NamedTuple):
    block_m: int  # queries of a tile; decode takes what the group needs
    block_n: int  # keys of a tile
    warps: int
    stages: int
    tma: bool = False  # walk tiles by Hopper's copy engine

    def constants(self, dim: int, far_count: int) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_F": 16 if far_count <= 16 else 32,
            "BLOCK_D": padded(dim),
        }


# {chip: {(bytes of a number, head size up to): {kernel: candidates, best guess first}}}. "small": chips with less than
# 100 KB of shared memory, and those that nobody has tuned for.
_HALF_SMALL = {
    64: {
        "forward": [Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
        "query": [Config(64, 64, 8, 2)],
        "key": [Config(32, 64, 8, 2)],
        "far": [Config(32, 16, 4, 2)],
        "decode": [Config(16, 64, 4, 3), Config(16, 128, 4, 2)],
    },
    128: {
        "forward": [Config(64, 32, 4, 2), Config(128, 32, 8, 2)],
        "query": [Config(64, 32, 8, 2)],
        "key": [Config(32, 64, 8, 2)],
        "far": [Config(32, 16, 4, 2)],
        "decode": [Config(16, 64, 4, 2), Config(16, 32, 4, 3)],
    },
    256: {
        "forward": [Config(64, 32, 8, 1)],
        "query": [Config(32, 32, 8, 1)],
        "key": [Config(32, 32, 8, 1)],
        "far": [Config(16, 16, 8, 1)],
        "decode": [Config(16, 32, 4, 2)],
    },
}
_SINGLE = {
    64: {
        "forward": [Config(64, 32, 8, 2), Config(32, 32, 4, 2)],
        "query": [Config(32, 32, 8, 2)],
        "key": [Config(32, 32, 8, 2)],
        "far": [Config(16, 16, 4, 1)],
        "decode": [Config(16, 32, 4, 2)],
    },
    128: {
        "forward": [Config(32, 16, 8, 2)],
        "query": [Config(32, 16, 8, 1)],
        "key": [Config(16, 32, 8, 1)],
        "far": [Config(16, 16, 4, 1)],
        "decode": [Config(16, 16, 8, 1)],
    },
    256: {
        "forward": [Config(32, 16, 8, 1)],
        "query": [Config(16, 16, 8, 1)],
        "key": [Config(16, 16, 8, 1)],
        "far": [Config(16, 16, 8, 1)],
        "decode": [Config(16, 16, 8, 1)],
    },
}
_HALF_AMPERE = {
    64: _HALF_SMALL[64] | {
        "forward": [Config(128, 64, 8, 3), Config(64, 64, 4, 3)],
        "key": [Config(64, 32, 8, 2), Config(32, 64, 8, 1)],
    },
    128: _HALF_SMALL[128] | {
        "forward": [Config(128, 32, 8, 3), Config(64, 32, 4, 3)],
        "query": [Config(64, 64, 8, 2), Config(128, 32, 8, 2)],
        "key": [Config(64, 64, 8, 2), Config(32, 64, 8, 2)],
        "decode": [Config(16, 64, 4, 3), Config(16, 64, 4, 2)],
    },
    256: _HALF_SMALL[256] | {"forward": [Config(64, 32, 8, 2)]},
}  # fmt: skip
_HALF_HOPPER = {
    64: {
        "forward": [Config(128, 128, 8, 3, tma=True), Config(128, 64, 8, 3, tma=True)],
        "query": [Config(128, 64, 8, 2, tma=True)],
        "key": [Config(32, 128, 8, 2, tma=True), Config(32, 64, 8, 2, tma=True)],
        "far": [Config(64, 16, 4, 2)],
        "decode": [Config(16, 64, 4, 3), Config(16, 128, 4, 3)],
    },
    128: {
        "forward": [Config(128, 64, 8, 3, tma=True), Config(128, 128, 8, 2, tma=True)],
        "query": [Config(128, 64, 8, 2, tma=True)],
        "key": [Config(32, 64, 8, 2, tma=True), Config(32, 128, 8, 1, tma=True)],
        "far": [Config(64, 16, 4, 2)],
        "decode": [Config(16, 64, 4, 3), Config(16, 128, 8, 3)],
    },
    256: {
        "forward": [Config(128, 64, 8, 2, tma=True)],
        "query": [Config(64, 32, 8, 2, tma=True)],
        "key": [Config(32, 32, 8, 1)],
        "far": [Config(32, 16, 8, 1)],
        "decode": [Config(16, 64, 4, 2)],
    },
}
# Rows that the copy engine cannot read come through pointers, which need more registers.
_HALF_POINTERS = _HALF_AMPERE | {128: _HALF_AMPERE[128] | {"key": [Config(32, 64, 8, 2)]}}
TABLE = {
    "hopper": {2: _HALF_HOPPER, 4: _SINGLE},
    "hopper pointers": {2: _HALF_POINTERS, 4: _SINGLE},
    "ampere": {2: _HALF_AMPERE, 4: _SINGLE},
    "small": {2: _HALF_SMALL, 4: _SINGLE},
}
INTERPRETED = Config(16, 16, 4, 1, tma=True)  # small, so that few tokens meet every kind of tile
KERNELS = ("forward", "query", "key", "far", "decode")


def padded(dim: int) -> int:
    """Head size as the kernels see it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def chip(device: torch.device) -> str:
    """Row of the table for a device."""
    if device.type != "cuda":
        return "interpreter"
    return {(8, 0): "ampere", (9, 0): "hopper"}.get(torch.cuda.get_device_capability(device), "small")


def candidates(kernel: str, chip_name: str, number_bytes: int, dim: int) -> list[Config]:
    if chip_name == "interpreter":
        return [INTERPRETED]
    if chip_name == "hopper" and dim != padded(dim):
        chip_name = "hopper pointers"
    return TABLE[chip_name][number_bytes][max(64, padded(dim))][kernel]


def choose(kernel: str, x: LambdaInputs) -> Config:
    """The fastest candidate that was measured on this chip, else the first."""
    name, size, dim = chip(x.query.device), x.query.element_size(), x.query.shape[-1]
    options = candidates(kernel, name, size, dim)
    if len(options) == 1:
        return options[0]
    return options[measured(name).get(measured_key(kernel, size, dim), 0) % len(options)]


def measured_key(kernel: str, number_bytes: int, dim: int) -> str:
    return f"{kernel} {number_bytes} {max(64, padded(dim))}"


def measured_path(chip_name: str) -> Path:
    """Where `python -m benchmarks.gpu --tune` leaves which candidates won."""
    return Path.home() / ".cache" / "longpatch" / f"tuned_{chip_name}.json"


@functools.cache
def measured(chip_name: str) -> dict[str, int]:
    path = measured_path(chip_name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def launch_options(x: LambdaInputs, config: Config) -> dict[str, Any]:
    """Fused multiply-add is asked for because Triton's default for it changes between versions."""
    return {
        "PRECISION": "ieee" if x.query.dtype == torch.float32 else "tf32",
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def split(rows: int, keys: int, config: Config, device: torch.device) -> tuple[int, int]:
    """How many programs share the keys of each of `rows` (row, key head) pairs, and keys per program.

    Enough programs to fill the chip twice, whole tiles each.
    """
    tiles = max(1, -(-keys // config.block_n))
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = max(1, min(tiles, 2 * processors // max(1, rows), LARGEST_MERGE))
    per_program = -(-tiles // wanted)
    return -(-tiles // per_program), per_program * config.block_n
