"""A decode step's time, and the memory, against the number of tokens that left the window.

    python -m benchmarks.recall_cost --evicted 0 16384 131072 1048576

The model has SmolLM2's shape (30 layers, 9/3 heads of 64, hidden 576) and random weights, in float32. Every layer has
block representatives of its own; the tokens' keys and values are shared between layers, because 1M tokens of 30 layers
would take 46 GB: a step reads only the chosen ones. In token mode, which reads every key, `--layers` layers are timed
with keys of their own, and the step is that of a model with as many layers.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longpatch import LambdaCache, Recall, convert_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.recall_cost"
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
    parser.add_argument("--layers", type=int, default=4, help="layers of the model timed in token mode")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, metavar="JSONL")
    return parser.parse_args()


def model_of(layers: int, window: int, recall: Recall | None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, max_position_embeddings=8192)
    return convert_model(LlamaForCausalLM(config).eval(), window, 10, recall=recall)


@torch.no_grad()
def filled(model: LlamaForCausalLM, evicted: int, share: bool) -> LambdaCache:
    """A cache after `evicted` tokens left the window, its keys and values normally distributed."""
    settings = model.longpatch.config
    cache = LambdaCache(model.config)
    total = evicted + settings.local_branch + settings.global_branch
    model.base_model(torch.randint(0, 1000, (1, settings.local_branch + settings.slack)), past_key_values=cache)
    first = None
    cache.length.fill_(total)
    cache.written.fill_(total)
    for memory in cache.memories():
        memory.reset()
        if share and first is not None:
            memory.segments, memory.lengths = first.segments, [total - settings.global_branch]
        else:
            for start in range(0, total - settings.global_branch, 4096):
                count = min(4096, total - settings.global_branch - start)
                memory.append(*torch.randn(2, 1, 3, count, 64), [start])
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
        "blocks": (30, Recall(top_k=blocks, block_tokens=size)),
        "tokens": (arguments.layers, Recall(top_k=arguments.tokens)),
    }
    for mode, (layers, recall) in modes.items():
        plain = model_of(layers, arguments.window, None)
        model = model_of(layers, arguments.window, recall)
        for evicted in arguments.evicted:
            base_cache, cache = filled(plain, evicted, False), filled(model, evicted, share=mode == "blocks")
            base, with_recall = step_ms([(plain, base_cache), (model, cache)], arguments.steps)
            recalled = model.longpatch.recalled(cache)
            assert len(recalled) == layers  # every layer did recall
            assert all((tokens >= 0).any() for tokens in recalled.values())
            ratio = statistics.median(with_recall) / statistics.median(base)
            print(
                f"{mode:<7}{evicted:>10} evicted: {statistics.median(base):8.1f} ms without, "
                f"{statistics.median(with_recall):8.1f} with recall, {ratio:5.2f} times",
                flush=True,
            )
            settings = {"mode": mode, "evicted": evicted, "layers": layers, "window": arguments.window}
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
