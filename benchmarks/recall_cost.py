"""A decode step's time, and the memory, against the number of tokens that left the window.

    python -m benchmarks.recall_cost --modes blocks --evicted 16384 131072 1048576
    python -m benchmarks.recall_cost --modes tokens --evicted 16384 131072 1048576 --steps 5

The model has SmolLM2's shape (30 layers, 9/3 heads of 64, hidden 576) and random weights, in float32. Every layer has
block representatives of its own. Past --own tokens the keys and values are shared between layers, because 1M tokens of
30 layers would take 48 GB: in block mode a step reads only the chosen ones; in token mode every layer reads all keys,
which are then more than the CPU's caches hold.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longpatch import LambdaCache, Recall, convert_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.recall_cost"
LAYERS = 30
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evicted", type=int, nargs="+", default=[16_384, 131_072, 1_048_576])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--blocks", default="4,64", metavar="K,TOKENS", help="block mode: blocks, tokens of each")
    parser.add_argument("--tokens", type=int, default=5, metavar="K", help="token mode: tokens")
    parser.add_argument("--modes", nargs="+", choices=("blocks", "tokens"), default=["blocks", "tokens"])
    parser.add_argument("--own", type=int, default=32_768, metavar="N", help="up to so many tokens are not shared")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, metavar="JSONL")
    return parser.parse_args()


def two_models(window: int, recall: Recall) -> list[LlamaForCausalLM]:
    """One model without recall and one with, which share their weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=LAYERS, max_position_embeddings=8192)
    plain = LlamaForCausalLM(config).eval()
    other = copy.deepcopy(plain, {id(weights): weights for weights in plain.parameters()})
    return [convert_model(plain, window, 10), convert_model(other, window, 10, recall=recall)]


@torch.no_grad()
def filled(model: LlamaForCausalLM, evicted: int, share: bool) -> LambdaCache:
    """A cache after `evicted` tokens left the window, its keys and values normally distributed."""
    settings = model.longpatch.config
    cache = LambdaCache(model.config)
    total = evicted + settings.local_branch + settings.global_branch
    model.base_model(torch.ones(1, 2, dtype=torch.long), past_key_values=cache)
    for layer in cache.layers:
        layer._make_room(layer.ring_size)
        layer.keys.normal_()
        layer.values.normal_()
    first = None
    cache.length.fill_(total)
    cache.written.fill_(total)
    for memory in cache.memories():
        memory.reset()
        if share and first is not None:
            memory.segments, memory.lengths = first.segments, first.lengths
            if first.index is not None and memory.index is not None:
                memory.index.keys, memory.index.done = first.index.keys.clone(), first.index.done
        else:
            for start in range(0, total - settings.global_branch, 4096):
                count = min(4096, total - settings.global_branch - start)
                memory.append(*torch.randn(2, 1, 3, count, 64), [start])
            if memory.index is not None:
                blocks = evicted // memory.settings.block_tokens
                memory.representatives(blocks, blocks, torch.empty(0))
        first = first or memory
    return cache


@torch.no_grad()
def step_ms(arms: list[tuple[LlamaForCausalLM, LambdaCache]], steps: int) -> list[list[float]]:
    """Milliseconds of decode steps of each (model, cache), taken in turns: a busy machine slows them alike."""
    token, times = torch.ones(1, 1, dtype=torch.long), [[] for _ in arms]
    for _ in range(steps + 2):
        for (model, cache), of_arm in zip(arms, times, strict=True):
            began = time.perf_counter()
            model(token, past_key_values=cache)
            of_arm.append(1000 * (time.perf_counter() - began))
    return [sorted(of_arm[2:]) for of_arm in times]  # the first step looks through all blocks once


def main():
    arguments = parse_arguments()
    blocks, size = (int(number) for number in arguments.blocks.split(","))
    records = []
    modes = {
        "blocks": Recall(top_k=blocks, block_tokens=size),
        "tokens": Recall(top_k=arguments.tokens),
    }
    for mode in arguments.modes:
        recall = modes[mode]
        plain, model = two_models(arguments.window, recall)
        for evicted in arguments.evicted:
            base_cache, cache = filled(plain, evicted, False), filled(model, evicted, share=evicted > arguments.own)
            base, with_recall = step_ms([(plain, base_cache), (model, cache)], arguments.steps)
            recalled = model.longpatch.recalled(cache)
            assert len(recalled) == LAYERS  # every layer did recall
            assert all((tokens >= 0).any() for tokens in recalled.values())
            ratio = statistics.median(with_recall) / statistics.median(base)
            print(
                f"{mode:<7}{evicted:>10} evicted: {statistics.median(base):8.1f} ms without, "
                f"{statistics.median(with_recall):8.1f} with recall, {ratio:5.2f} times",
                flush=True,
            )
            settings = {"mode": mode, "evicted": evicted, "layers": LAYERS, "window": arguments.window}
            for arm, times in (("none", base), (str(recall), with_recall)):
                value = statistics.median(times)
                records.append(
                    record(COMMAND, "smollm2-shape", "step_time", value, "ms", len(times), recall=arm, **settings)
                )
            del cache, base_cache
    if arguments.out:
        write_records(arguments.out, records)


if __name__ == "__main__":
    main()
