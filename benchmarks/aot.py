"""Compile the Triton kernels ahead of time, without a GPU: registers, shared memory, spills, matmul instructions.

    python -m benchmarks.aot [--chip sm80 sm90] [--quick] [--only forward,bfloat16,128] [--out FILE [--missing]]

The real launch code runs on meta tensors; only the launch itself is replaced by compilation: what is compiled is what
would run. `--quick` compiles the first candidate of each kernel, dtype and head size alone, without extra rules.
FILE is written after every row, so that `--missing` goes on where an earlier run was stopped.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from longpatch_kernels.inputs import FarSegment, LambdaInputs
from longpatch_kernels.triton import tuning

CHIPS = {"sm80": ("ampere", 80), "sm86": ("small", 86), "sm90": ("hopper", 90)}
SHARED_LIMIT = {"sm80": 166_912, "sm86": 101_376, "sm90": 232_448}  # bytes that one program may ask for
STACK_LIMIT = 64  # bytes a thread may spill
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEADS = (64, 96, 128, 256)  # 96: padded by a mask, and read through pointers on every chip
RESULTS = Path(__file__).parent / "results" / "aot.json"


class Compiler:
    """Stands in for Triton's driver: reports the chip, and gathers what the launches compile."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.target, self.compiled, self.only = GPUTarget("cuda", capability, 32), [], None
        driver.set_active(self)
        launch = getattr(JITFunction.run, "original", JITFunction.run)  # a second chip in the same process

        def compile_only(function, *args, grid, warmup, **options):
            if self.only in (None, function.__name__):
                compiled = launch(function, *args, grid=grid, warmup=True, **options)
                self.compiled.append((function.__name__, compiled))

        compile_only.original = launch  # type: ignore[attr-defined]
        JITFunction.run = compile_only

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device) -> int:
        return 0

    def get_device_interface(self):
        return torch.cuda


def example(dtype: torch.dtype, dim: int, queries: int, heads: int = 32, key_heads: int = 8) -> LambdaInputs:
    """A grouped-query call on meta tensors: window 4096, ten sinks."""

    def empty(count_heads, tokens):
        return torch.empty(1, count_heads, tokens, dim, dtype=dtype, device="meta")

    keys = 8192
    positions = torch.empty(1, 10, dtype=torch.int64, device="meta")
    far = FarSegment(empty(heads, queries), empty(key_heads, 10), empty(key_heads, 10), positions, None, None)
    return LambdaInputs(
        empty(heads, queries), empty(key_heads, keys), empty(key_heads, keys), 4096, far, None, 0, dim**-0.5, None, None
    )  # fmt: skip


def launch(kernel: str, x: LambdaInputs):
    """Run the host code that launches one kernel."""
    from longpatch_kernels.triton import decode, far, forward, key, query

    lse = torch.empty(x.query.shape[:3], dtype=torch.float32, device="meta")
    if kernel == "forward":
        forward.forward(x)
    elif kernel == "decode":
        decode.decode(x)
    elif kernel == "query":
        query.query_grads(x, x.query, lse, lse)
    elif kernel == "key":
        key.key_grads(x, x.query, lse, lse)
    elif x.far is not None:
        far.far_grads(x, x.far, x.query, lse, lse)


def variants(x: LambdaInputs) -> Iterator[tuple[str, LambdaInputs]]:
    """The plain call, and one with every extra rule at once, which needs the most registers."""
    yield "plain", x
    if x.far is not None:
        heads = x.query.shape[1]
        mask = torch.empty(*x.query.shape[:3], 10, dtype=torch.bool, device="meta")
        far = replace(x.far, mask=mask, distance=torch.empty(1, 10, device="meta"))
        valid = torch.empty(1, dtype=torch.int64, device="meta")
        slopes = torch.empty(heads, device="meta")
        yield "all rules", replace(x, far=far, first_valid=valid, alibi_slopes=slopes, softcap=30.0)


def measure(compiled) -> dict[str, int]:
    """Registers and spilled bytes a thread, shared bytes a program, matrix instructions; from the machine code."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage}")
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
        "spill_loads": len(re.findall(r"\bLDL\b", code)),
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "hmma": len(re.findall(r"\bHMMA\b", code)),
        "tma_loads": len(re.findall(r"\bUTMALDG\b", code)),
    }


def configurations(chip: str, quick: bool) -> Iterator[tuple[str, torch.dtype, int, tuning.Config]]:
    for dtype in DTYPES:
        for dim in (64, 128) if quick else HEADS:
            for kernel in tuning.KERNELS:
                found = tuning.candidates(kernel, CHIPS[chip][0], dtype.itemsize, dim)
                for config in found[:1] if quick else found:
                    yield kernel, dtype, dim, config


def compile_all(chip: str, quick: bool, only: list[str], known: Collection[tuple] = ()) -> Iterator[dict]:
    """One row per compiled kernel, but those whose identity is known."""
    import triton
    from triton import knobs

    if knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is on: nothing would be compiled")
    compiler = Compiler(CHIPS[chip][1])
    tuning.split = lambda *_: (8, 512)
    for kernel, dtype, dim, config in configurations(chip, quick):
        name = str(dtype).removeprefix("torch.")
        if any(word not in (kernel, name, str(dim)) for word in only):
            continue
        tuning.choose = lambda *_, config=config: config
        compiler.only = f"{kernel}_kernel"
        for variant, x in variants(example(dtype, dim, 1 if kernel == "decode" else 4096)):
            if quick and variant != "plain":
                continue
            row = {"triton": triton.__version__, "chip": chip, "kernel": kernel, "dtype": name, "head_dim": dim}
            row |= {"variant": variant, **config._asdict()}
            if identity(row) in known:
                continue
            started = perf_counter()
            compiler.compiled.clear()
            launch(kernel, x)
            row |= measure(compiler.compiled[-1][1])
            row["fits"] = row["stack_bytes"] <= STACK_LIMIT and row["shared_bytes"] <= SHARED_LIMIT[chip]
            yield row | {"seconds": round(perf_counter() - started, 1)}


def identity(row: dict) -> tuple:
    """What a row is about, without what was found."""
    about = ("triton", "chip", "kernel", "dtype", "head_dim", "variant", *tuning.Config._fields)
    return tuple(row[name] for name in about)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=["sm80", "sm90"])
    parser.add_argument("--quick", action="store_true", help="the first candidate of each kernel, dtype and head size")
    parser.add_argument("--only", default="", help="words that must match: kernel, dtype, head size, comma-separated")
    parser.add_argument("--out", type=Path, help="merge the rows into this file")
    parser.add_argument("--missing", action="store_true", help="leave out what that file has already")
    options = parser.parse_args(arguments)
    kept = {}
    if options.out and options.out.exists():
        kept = {identity(row): row for row in json.loads(options.out.read_text(encoding="utf-8"))}
    known, fits = set(kept) if options.missing else (), True
    for chip in options.chip:
        for row in compile_all(chip, options.quick, [word for word in options.only.split(",") if word], known):
            print(json.dumps(row), flush=True)
            fits = fits and row["fits"]
            kept[identity(row)] = row
            if options.out:
                lines = ",\n".join(map(json.dumps, kept.values()))
                options.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
