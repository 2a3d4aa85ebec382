"""Time and memory of writing while learning: each token's share of generating, learning and building the cache anew.

    python -m benchmarks.writing BOOK.txt --out FILE

The model is the one in the package, converted; the settings are those of `benchmarks.temp_lora`. Memory is the most
that the process holds while 5 chunks are written, then 20: it must not grow. Times are of the processor, shared out as
wall time was; ways take turns within one process.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from longpatch import TempLoraGenerator, convert_model
from longpatch.demo import load
from longpatch.evaluation.memory import peak_bytes, reset_peak
from longpatch.results import record, write_records

CHUNK, PROMPT = 128, 256
LEARN = {
    "rank": 16,
    "alpha": 16,
    "dropout": 0.0,
    "learning_rate": 1e-3,
    "epochs": 1,
    "measure": False,
    "progress": False,
}
WAYS: dict[str, dict] = {
    "rebuilt each chunk": {},
    "cache kept 4 chunks": {"cache_reuse_chunks": 4},
    "queries alone": {"trainable": "queries"},
    "context detached": {"context_grad": False},
}


def write(model, prompt: torch.Tensor, chunks: int, settings: dict | None) -> dict[str, float]:
    """Seconds to write `chunks` chunks: all, and its parts."""
    torch.manual_seed(0)
    write, parts = model.generate, dict.fromkeys(("learn", "rebuild"), 0.0)
    if settings is not None:
        generator = TempLoraGenerator(model, chunk_tokens=CHUNK, context_tokens=PROMPT, **LEARN | settings)
        write = generator.generate
    began = time.process_time(), time.perf_counter()
    write(prompt, max_new_tokens=chunks * CHUNK, do_sample=True, top_k=50)
    used, wall = time.process_time() - began[0], time.perf_counter() - began[1]
    if settings is not None:
        parts = {part: sum(e[f"{part}_seconds"] for e in generator.history) * used / wall for part in parts}
    return {"all": used, "generate": used - sum(parts.values()), **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load()
    model = convert_model(model, 256, 4)
    text = arguments.text.read_text(encoding="utf-8")[:10_000]
    prompt = torch.tensor([tokenizer.encode(text)[:PROMPT]])
    lines = []

    def line(metric: str, value: float, unit: str, n: int, **settings) -> None:
        lines.append(record("benchmarks.writing", "demo", metric, value, unit, n, seed=0, **settings))
        print(f"{settings!s:<44}{metric:<16}{value:10.2f} {unit}", flush=True)

    for chunks in (5, 20):
        reset_peak()
        write(model, prompt, chunks, {})
        line("peak_memory", peak_bytes() / 2**20, "MiB", chunks * CHUNK, chunks=chunks)
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in ("plain", *WAYS)}
    for _ in range(arguments.rounds):
        for name, found in spent.items():
            found.append(write(model, prompt, arguments.chunks, WAYS.get(name)))
    new = arguments.chunks * CHUNK
    for name, found in spent.items():
        for part in found[0]:
            milliseconds = 1e3 * statistics.median(entry[part] for entry in found) / new
            line("time", milliseconds, "ms/token", new, way=name, part=part)
    if arguments.out:
        write_records(arguments.out, lines)


if __name__ == "__main__":
    main()
