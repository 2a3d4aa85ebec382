"""Which configuration of each Triton kernel is fastest on this chip, left where `tuning.choose` finds it."""

import json
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cuda import backward_of, cuda_seconds, tensors, time_calls
from benchmarks.roofline import Shape
from longpatch_kernels import lambda_attention
from longpatch_kernels.triton import tuning


def tune(shape: Shape, repeats: int, timer: Callable = cuda_seconds, device: str = "cuda") -> dict[str, int]:
    """Time every kernel that has more than one candidate; returns the winners' places in their lists."""
    chip = tuning.chip(torch.device(device))
    winners = {}
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 128, 256):
            for kernel in tuning.KERNELS:
                found = tuning.candidates(kernel, chip, dtype.itemsize, dim)
                if len(found) > 1:
                    key = tuning.measured_key(kernel, dtype.itemsize, dim)
                    call = _call(kernel, shape._replace(dim=dim), dtype, device)
                    seconds = []
                    for index in range(len(found)):
                        tuning.measured(chip)[key] = index
                        seconds.append(time_calls({"ours": call}, repeats, timer)["ours"]["seconds"])
                    winners[key] = tuning.measured(chip)[key] = seconds.index(min(seconds))
    path = tuning.measured_path(chip)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(winners, indent=1), encoding="utf-8")
    return winners


def _call(kernel: str, shape: Shape, dtype: torch.dtype, device: str) -> Callable:
    """Something that runs `kernel`; in a backward the other kernels take the same time for each of its candidates."""
    if kernel == "decode":
        arguments = tensors(shape._replace(tokens=1), dtype, device, keys=shape.window + 64)
    else:
        arguments = tensors(shape, dtype, device)
    if kernel in ("forward", "decode"):
        return torch.no_grad()(partial(lambda_attention, **arguments, implementation="triton"))
    return backward_of(arguments)
