"""Tile sizes, warps and pipeline stages of the Triton kernels, by chip, number size and head size."""

from typing import Any, NamedTuple

import torch

from .inputs import LambdaInputs


class Config(NamedTuple):
    block_m: int  # queries of a tile
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


# Candidates, best guess first: {kernel: {chip: {(bytes of a number, padded head size): candidates}}}.
TABLE: dict[str, dict[str, dict[tuple[int, int], list[Config]]]] = {}
INTERPRETED = Config(16, 16, 4, 1, tma=True)  # small, so that few tokens meet every kind of tile


def padded(dim: int) -> int:
    """Head size as the kernels see it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def chip(device: torch.device) -> str:
    """Row of the table for a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "hopper"}.get((major, minor), "small")


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def options(x: LambdaInputs, config: Config) -> dict[str, Any]:
    """Launch options; fused multiply-add is asked for because Triton's default changes between versions."""
    return {
        "PRECISION": precision(x.query.dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def choose(kernel: str, x: LambdaInputs) -> Config:
    if not x.query.is_cuda:
        return INTERPRETED
    return TABLE[kernel][chip(x.query.device)][x.query.element_size(), padded(x.query.shape[-1])][0]


DECODE_ROWS = 64  # query rows that one decode tile holds


def split(rows: int, keys: int, config: Config, device: torch.device) -> tuple[int, int]:
    """How many programs share the keys of each of `rows` (row, key head) pairs, and keys per program.

    Enough programs to fill the chip twice, whole tiles each, at most 64 for the merge.
    """
    tiles = max(1, -(-keys // config.block_n))
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = max(1, min(tiles, 2 * processors // max(1, rows), 64))
    per_program = -(-tiles // wanted)
    return -(-tiles // per_program), per_program * config.block_n
