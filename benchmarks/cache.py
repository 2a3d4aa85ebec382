"""Decoding with a preallocated cache beside the growing one of transformers: time, peak memory, allocations.

    python -m benchmarks.cache                          # the shape of SmolLM2-135M, 16,384 tokens, float32
    python -m benchmarks.cache --tokens 4096 --new 16

Random weights: time does not depend on them. What is timed is CPU time of all threads, so that other programs on a
busy machine add least; use one thread. The caches hold the same tokens and take turns, one token each; their logits
are compared before a time is printed. Beside the two, "converted" is the model with Λ-attention and a window longer
than the text, which is full attention by our own kernel. Peak memory is that of a fresh process that fills one cache in
chunks of 2,048 tokens and adds `--new` more one by one, over what it had before.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.training_memory import memory_changes
from longpatch import LambdaCache, PreallocatedCache, convert_model
from longpatch.evaluation.memory import peak_bytes, reset_peak
from longpatch.padding import Padding
from longpatch.results import read_records, record, write_records
from longpatch.step import Step

COMMAND = "benchmarks.cache"
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
CHUNK = 2048
LARGE = 1 << 20  # bytes from which an allocation counts


def make_cache(kind, config, tokens):
    return PreallocatedCache(config, tokens) if kind == "preallocated" else DynamicCache(config=config)


def fill(cache, config, tokens, count=CHUNK):
    """Random keys and values in every layer, as a prefill by chunks leaves them."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, tokens, count):
        size = min(count, tokens - start)
        for layer in range(config.num_hidden_layers):
            states = torch.randn(1, config.num_key_value_heads, size, config.head_dim, generator=generator)
            cache.update(states, states, layer)


def filled_and_converted(model, tokens, room):
    """The model with a window of `room`, and its cache, filled as the others are."""
    model = convert_model(copy.deepcopy(model), room, 0)
    conversion, cache = model.model.longpatch, LambdaCache(model.config)
    positions = torch.arange(tokens)[None]
    step = Step.create(conversion.config, conversion.layers, conversion.rotary, positions, 0, None, False)
    cache.begin(step, Padding())
    fill(cache, model.config, tokens, count=tokens)
    cache.end()
    return model, cache


def memory(kind, tokens, new):
    """Bytes by which filling a cache raised this process's peak; run in a process of its own."""
    config = LlamaConfig(**SHAPE)
    torch.randn(1, config.num_key_value_heads, CHUNK, config.head_dim)
    reset_peak()
    before = peak_bytes()
    cache = make_cache(kind, config, tokens + new)
    fill(cache, config, tokens)
    fill(cache, config, new, count=1)
    return peak_bytes() - before


def peak_of(kind, arguments):
    command = [sys.executable, "-m", "benchmarks.cache", "--memory", kind]
    command += ["--tokens", str(arguments.tokens), "--new", str(arguments.new)]
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=on_cpu).stdout)


@torch.no_grad()
def decode(arguments):
    """{kind: (ms per token of each round, large allocations per token)}"""
    torch.manual_seed(0)
    room = arguments.tokens + arguments.new + 2
    config = LlamaConfig(**SHAPE, max_position_embeddings=room)
    model = LlamaForCausalLM(config).eval()
    peers = {kind: (model, make_cache(kind, config, room)) for kind in KINDS}
    for _, cache in peers.values():
        fill(cache, config, arguments.tokens, count=arguments.tokens)
    peers["converted"] = filled_and_converted(model, arguments.tokens, room)
    ids = torch.randint(0, config.vocab_size, (1, arguments.new + 2))
    times = {kind: [] for kind in peers}
    for step in range(arguments.new + 1):
        logits = {}
        for kind, (peer, cache) in peers.items():
            began = time.process_time()
            logits[kind] = peer(ids[:, step : step + 1], past_key_values=cache).logits
            if step:  # the first is warm-up
                times[kind].append(1000 * (time.process_time() - began))
        for kind, tolerance in (("preallocated", 1e-4), ("converted", 2e-3)):  # its rotary phases are exact
            torch.testing.assert_close(logits[kind], logits["growing"], atol=tolerance, rtol=tolerance)
    allocations = {}
    for kind, (peer, cache) in peers.items():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            peer(ids[:, -1:], past_key_values=cache)
        allocations[kind] = sum(size >= LARGE for size in memory_changes(profiler))
    return times, allocations


KINDS = ("growing", "preallocated")


def measure_memory(arguments):
    """Records of peak memory, of either cache in a process of its own."""
    formula = PreallocatedCache.memory_bytes(LlamaConfig(**SHAPE), arguments.tokens + arguments.new)
    for kind in KINDS:
        peak = peak_of(kind, arguments)
        print(f"{kind:<13}peak {peak / 2**20:,.0f} MiB = {peak / formula:.3f} of the formula")
        settings = {"cache": kind, "tokens": arguments.tokens, "new": arguments.new}
        yield record(COMMAND, "smollm2-shape", "peak_memory", peak, "B", 1, **settings)
        yield record(COMMAND, "smollm2-shape", "peak_memory_to_formula", peak / formula, "1", 1, **settings)


def measure_decode(arguments):
    """Records of time and allocations a token."""
    times, allocations = decode(arguments)
    shared = {"tokens": arguments.tokens, "threads": torch.get_num_threads()}
    for kind in times:
        median, count = statistics.median(times[kind]), len(times[kind])
        p20, *_, p80 = statistics.quantiles(times[kind], n=5)
        ratio = statistics.median(a / b for a, b in zip(times["growing"], times[kind], strict=True))
        print(
            f"{kind:<13}{median:>8.1f} ms a token (p20 {p20:.1f}, p80 {p80:.1f}), {ratio:.2f} times as fast as the "
            f"growing one, {allocations[kind]} allocations of 1 MiB or more a token"
        )
        for metric, value, unit, n in (
            ("latency", median, "ms", count),
            ("speedup", ratio, "1", count),
            ("large_allocations", allocations[kind], "1", 1),
        ):
            yield record(COMMAND, "smollm2-shape", metric, value, unit, n, cache=kind, **shared)


PARTS = {"memory": measure_memory, "decode": measure_decode}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--new", type=int, default=32, help="tokens decoded, one by one")
    parser.add_argument("--only", choices=PARTS, help="one part; the other's records in --out stay")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cache.jsonl"), metavar="JSONL")
    parser.add_argument("--memory", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(memory(arguments.memory, arguments.tokens, arguments.new))
        return
    records = [line for part in PARTS if arguments.only in (None, part) for line in PARTS[part](arguments)]
    measured = {line["metric"] for line in records}
    before = read_records(arguments.out) if arguments.out.exists() else []
    write_records(arguments.out, [line for line in before if line["metric"] not in measured] + records)


if __name__ == "__main__":
    main()
