"""Arguments of a shape on a CUDA device, and device times of calls that take turns."""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.roofline import Shape
from longpatch_kernels import lambda_attention


def tensors(shape: Shape, dtype: torch.dtype, device: str, keys: int | None = None) -> dict:
    """Standard-normal arguments; the far keys are the first keys themselves, as for a model without positions."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads, tokens):
        size = (shape.batch, heads, tokens, shape.dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    keys = keys or shape.tokens
    arguments = {"query": normal(shape.heads, shape.tokens), "window": shape.window}
    arguments |= {"key": normal(shape.key_heads, keys), "value": normal(shape.key_heads, keys)}
    arguments["query_far"] = normal(shape.heads, shape.tokens)
    arguments |= {f"{name}_far": arguments[name][:, :, : shape.sinks].clone() for name in ("key", "value")}
    if keys > shape.tokens:  # a full ring: the sinks left it long ago
        arguments["far_positions"] = torch.arange(shape.sinks, device=device) - 10 * shape.window
    return arguments


def cuda_seconds(call: Callable, repeats: int) -> list[float]:
    """Device time of each call, the L2 cache swept in between."""
    sweep = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(repeats):
        sweep.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return times


def time_calls(calls: dict[str, Callable], repeats: int, timer: Callable = cuda_seconds) -> dict[str, dict]:
    """Interleaved: each round times every call once. Seconds."""
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name] += timer(call, 1)
    rows = {}
    for name, taken in times.items():
        fifths = statistics.quantiles(taken, n=5)
        rows[name] = {"seconds": statistics.median(taken), "p20": fifths[0], "p80": fifths[3]}
    return rows


def backward_of(arguments: dict) -> Callable:
    """A call that computes all gradients of one forward."""
    leaves = [value.requires_grad_() for value in arguments.values() if isinstance(value, torch.Tensor)]
    out, _ = lambda_attention(**arguments, implementation="triton")
    return partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
