"""A training step with shifted sparse attention beside one with full attention, at a number of groups' length.

    python -m benchmarks.shifted                       # the bundled model, groups of 256 tokens, 16 of them
    python -m benchmarks.shifted --model smollm2 --group 512

LoRA on all linear layers, float32, forward and backward with the chunked loss; the two take turns in one process.
Before a time is printed, both must have the same loss on a row of half a group, where they are the same thing.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from peft import get_peft_model

from longpatch.finetune.loss import chunk_loss
from longpatch.finetune.model import lora_config
from longpatch.finetune.sections import LoraSection
from longpatch.finetune.shifted import shift_attention
from longpatch.models import load_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.shifted"


def learner(name, group):
    """The model with LoRA in training mode; `group` None: full attention."""
    torch.manual_seed(0)
    model, tokenizer = load_model(name)
    if group is not None:
        shift_attention(model, group)
    model = get_peft_model(model, lora_config(model, LoraSection()))
    model.config.use_cache = False
    chunk_loss(model)
    return model.train(), tokenizer


def step(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--group", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shifted.jsonl"), metavar="JSONL")
    arguments = parser.parse_args()
    full, tokenizer = learner(arguments.model, None)
    shifted, _ = learner(arguments.model, arguments.group)
    ids = torch.randint(0, len(tokenizer), (1, arguments.group * arguments.groups))
    half = arguments.group // 2
    losses = [step(model, ids[:, :half]) for model in (full, shifted)]
    assert abs(losses[0] - losses[1]) < 1e-4, losses
    times = {"full": [], "shifted": []}
    for turn in range(arguments.rounds + 1):
        for name, model in (("full", full), ("shifted", shifted)):
            began = time.perf_counter()
            step(model, ids)
            if turn:  # the first is warm-up
                times[name].append(time.perf_counter() - began)
    settings = {
        "group": arguments.group,
        "groups": arguments.groups,
        "tokens": ids.shape[1],
        "threads": torch.get_num_threads(),
    }
    records = []
    for name, each in times.items():
        p20, *_, p80 = statistics.quantiles(each, n=5)
        print(f"{name:<8} {statistics.median(each):.2f} s a step (p20 {p20:.2f}, p80 {p80:.2f})")
        value = 1000 * statistics.median(each)
        records.append(record(COMMAND, arguments.model, "step", value, "ms", len(each), attention=name, **settings))
    ratio = statistics.median(a / b for a, b in zip(times["full"], times["shifted"], strict=True))
    print(f"shifted is {ratio:.2f} times as fast (median of {arguments.rounds} pairs)")
    records.append(record(COMMAND, arguments.model, "speedup", ratio, "1", arguments.rounds, **settings))
    write_records(arguments.out, records)


if __name__ == "__main__":
    main()
