"""Check, then time Λ-attention and its peers on a CUDA GPU.

    python -m benchmarks.gpu [--quick] [--tune] [--out DIR]

Writes `DIR/<gpu>.json`, a list of rows, and `DIR/<gpu>.md`, the same as a table, anew after every shape. No time is
taken before the result was compared with the dense definition on a shape that fits. Times are medians with 20th and
80th percentiles; peers are timed in turns with ours in one process. What fails becomes a row that says how.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.cuda import backward_of, cuda_seconds, tensors, time_calls
from benchmarks.peers import PEERS
from benchmarks.roofline import Shape, backward_flops, decode_bytes, forward_flops
from longpatch_kernels import lambda_attention

RESULTS = Path(__file__).parent / "results"
PREFILL = [Shape(1, 32, 8, 128, 32_768, 4096, 10), Shape(1, 32, 8, 128, 131_072, 4096, 10)]
DECODE = [Shape(1, 32, 4, 128, 1, 4096, 10), Shape(32, 32, 4, 128, 1, 4096, 10)]
MILLION = Shape(1, 8, 2, 128, 1_048_576, 4096, 10)
CHECKED = Shape(1, 8, 2, 128, 1500, 400, 10)
QUICK_TOKENS = 8192


def check(device: str, implementation: str = "triton", shape: Shape = CHECKED, dtype=torch.bfloat16) -> float:
    """Largest error of out and gradients against float64, relative to the largest value. Raises if it is too large."""
    arguments = tensors(shape, dtype, device)
    results = []
    for name, number in ((implementation, dtype), ("reference", torch.float64)):
        leaves = {
            key: value.to(number).requires_grad_()
            for key, value in arguments.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        out, lse = lambda_attention(**(arguments | leaves), implementation=name)
        gradients = torch.autograd.grad(out.float().square().sum() + lse.float().sum(), list(leaves.values()))
        results.append([out.detach(), *gradients])
    worst = 0.0
    for mine, reference in zip(*results, strict=True):
        worst = max(worst, ((mine.double() - reference.double()).abs().max() / reference.abs().max()).item())
    if not worst < 2e-2:
        raise RuntimeError(f"{implementation} is off by {worst:.3g} of the largest value: no time is reported")
    return worst


def rate_rows(kind: str, shape: Shape, times: dict[str, dict], amount: float, unit: str, scale: float) -> list[dict]:
    """Rows of one comparison; `relative`: how many times faster than this entry ours is."""
    ours = times["ours"]["seconds"]
    return [
        {"kind": kind, "shape": str(shape), "name": name, **row, "rate": amount / row["seconds"] / scale, "unit": unit}
        | {"relative": row["seconds"] / ours}
        for name, row in times.items()
    ]


def failure(kind: str, shape: Shape, name: str, error: Exception) -> dict:
    """The row of what could not be measured."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return {"kind": kind, "shape": str(shape), "name": name, "error": text}


def prepared_peers(arguments: dict, shape: Shape) -> tuple[dict[str, Callable], list[dict]]:
    """Peers that run and agree with ours, or with our window alone where they compute no more; rows of the others."""
    window_alone = {name: value for name, value in arguments.items() if not name.endswith("_far")}
    calls, failed = {}, []
    for name, (prepare, same) in PEERS.items():
        try:
            calls[name] = prepare(arguments, shape)
            wanted, _ = lambda_attention(**(arguments if same else window_alone), implementation="triton")
            torch.testing.assert_close(calls[name](), wanted, atol=3e-2, rtol=3e-2)
        except Exception as error:  # must not cost the other measurements
            calls.pop(name, None)
            failed.append(failure("forward", shape, name, error))
    return calls, failed


@torch.no_grad()
def prefill_rows(shape: Shape, repeats: int, timer: Callable = cuda_seconds) -> list[dict]:
    arguments = tensors(shape, torch.bfloat16, "cuda")
    peers, failed = prepared_peers(arguments, shape)
    ours = partial(lambda_attention, **arguments, implementation="triton")
    times = time_calls({"ours": ours} | peers, repeats, timer)
    return rate_rows("forward", shape, times, forward_flops(shape), "TFLOP/s", 1e12) + failed


def backward_rows(shape: Shape, repeats: int, timer: Callable = cuda_seconds) -> list[dict]:
    times = time_calls({"ours": backward_of(tensors(shape, torch.bfloat16, "cuda"))}, repeats, timer)
    return rate_rows("backward", shape, times, backward_flops(shape), "TFLOP/s", 1e12)


def decode_rows(shape: Shape, repeats: int, timer: Callable = cuda_seconds) -> list[dict]:
    """One token against a full ring that wraps in the middle, against a copy of as many bytes."""
    arguments = tensors(shape, torch.bfloat16, "cuda", keys=shape.window + 64)
    arguments["ring_start"] = shape.window // 2
    moved = decode_bytes(shape)
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")  # a copy reads and writes
    target = torch.empty_like(source)
    with torch.no_grad():
        expected, _ = lambda_attention(**arguments, implementation="reference")
        actual, _ = lambda_attention(**arguments, implementation="triton")
        torch.testing.assert_close(actual, expected, atol=3e-2, rtol=3e-2)
        calls = {"ours": lambda: lambda_attention(**arguments, implementation="triton")}
        times = time_calls(calls | {"copy of as many bytes": lambda: target.copy_(source)}, repeats, timer)
    return rate_rows("decode", shape, times, moved, "TB/s", 1e12)


def memory_rows(shape: Shape) -> list[dict]:
    """Peak extra memory of one long prefill, beside its inputs and results."""
    arguments = tensors(shape, torch.bfloat16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        out, lse = lambda_attention(**arguments, implementation="triton")
    results = out.numel() * out.element_size() + lse.numel() * lse.element_size()
    extra = torch.cuda.max_memory_allocated() - before - results
    return [{"kind": "memory", "shape": str(shape), "name": "ours", "extra_bytes": extra}]


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| what | shape | implementation | ms (p20, p80) | rate | ours is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            times, rate, relative = "", f"failed: {row['error']}", ""
        elif "seconds" in row:
            times = f"{row['seconds'] * 1e3:.3f} ({row['p20'] * 1e3:.3f}, {row['p80'] * 1e3:.3f})"
            rate, relative = f"{row['rate']:.3g} {row['unit']}", f"{row['relative']:.2f}x"
        else:
            times, rate, relative = "", f"{row['extra_bytes'] / 2**20:.1f} MiB extra", ""
        lines.append(f"| {row['kind']} | {row['shape']} | {row['name']} | {times} | {rate} | {relative} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict], gpu: str, folder: Path) -> Path:
    """`<gpu>.json` and `<gpu>.md`, each row stamped with versions and commit."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout
    stamp = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit.strip()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{gpu.replace(' ', '_')}.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row | stamp) for row in rows) + "\n]\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TOKENS} tokens, few repeats")
    parser.add_argument("--tune", action="store_true", help="first choose among the tuned configurations by timing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device found; nothing was measured", file=sys.stderr)
        return 1
    repeats = 5 if options.quick else 30
    print(f"largest error against float64: {check('cuda'):.3g} of the largest value")
    if options.tune:
        from benchmarks.tune import tune

        tune(PREFILL[0]._replace(tokens=QUICK_TOKENS), repeats)
    rows = []
    for kind, measure, shape in measurements(options.quick, repeats):
        try:
            rows += measure(shape)
        except Exception as error:  # one shape that does not fit must not cost the others
            rows.append(failure(kind, shape, "ours", error))
        path = write(rows, torch.cuda.get_device_name(), options.out)
        torch.cuda.empty_cache()
    print(table(rows))
    print(f"written to {path}")
    return int(any(row["name"] == "ours" and "error" in row for row in rows))


def measurements(quick: bool, repeats: int) -> Iterator[tuple[str, Callable, Shape]]:
    """What is measured, how, and the shape."""
    for shape in [PREFILL[0]._replace(tokens=QUICK_TOKENS)] if quick else PREFILL:
        yield "forward", partial(prefill_rows, repeats=repeats), shape
        yield "backward", partial(backward_rows, repeats=repeats), shape
    for shape in DECODE:
        yield "decode", partial(decode_rows, repeats=repeats), shape
    if not quick:
        yield "memory", memory_rows, MILLION


if __name__ == "__main__":
    sys.exit(main())
