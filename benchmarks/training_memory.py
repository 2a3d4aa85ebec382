"""Peak memory of one training step on the CPU beside what `longpatch train --estimate` says.

    python -m benchmarks.training_memory examples/recipes/cpu-demo.yaml --lengths 1024 2048 4096
    python -m benchmarks.training_memory examples/recipes/smollm2-32k.yaml --lengths 256 512 --cpu

Measured are bytes that tensors hold: weights, what learns and its optimiser's state, and on top of that the most that
forward and backward of random tokens had allocated at one time, by PyTorch's profiler. What the process takes from the
system is more, on a CPU up to twice that, since freed memory is not at once of use again.
"""

import argparse
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from longpatch.finetune import read_config
from longpatch.finetune.estimate import estimate, mixed_dtype
from longpatch.finetune.model import prepare_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.training_memory"
ON_CPU = ["training.bf16=false", "training.fp16=false", "training.optim=adamw_torch", "model.dtype=float32"]


def learner(config):
    """(model, optimiser, tokens in its vocabulary), as the Trainer would have them."""
    model, tokenizer = prepare_model(config)
    if config.training.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model.train(), torch.optim.AdamW(learned), len(tokenizer)


def memory_changes(profiler):
    """Bytes of each allocation, negative where memory was freed, in the order of time."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return [size for _, size in changes]


def measure(model, optimizer, vocabulary, batch, length, mixed=None):
    """Bytes at the peak of one step on `batch` rows of `length` tokens, computed in `mixed` where it is a dtype."""

    def backward(count):
        ids = torch.randint(0, vocabulary, (batch, count))
        with torch.autocast("cpu", mixed) if mixed else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    backward(8)
    optimizer.step()  # its state is there now
    state = [tensor for held in optimizer.state.values() for tensor in held.values()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    kept = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers(), *gradients, *state]]
    fixed = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        backward(length)
    return fixed + max(accumulate(memory_changes(profiler)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--cpu", action="store_true", help="in float32, with PyTorch's AdamW")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE")
    parser.add_argument("--out", type=Path, metavar="JSONL")
    arguments = parser.parse_args()
    changes = [*(ON_CPU if arguments.cpu else []), *arguments.set]
    config = read_config(arguments.config, changes)
    model, optimizer, vocabulary = learner(config)
    batch = config.training.get("per_device_train_batch_size", 8)
    records = []
    for row in estimate(config, arguments.lengths):
        measured = measure(model, optimizer, vocabulary, batch, row.length, mixed_dtype(config))
        print(
            f"{row.length:>8} tokens: estimated {row.total / 2**20:>9.1f} MiB, measured {measured / 2**20:>9.1f} MiB, "
            f"ratio {row.total / measured:.3f}",
            flush=True,
        )
        settings = {"length": row.length, "batch": batch, "recipe": arguments.config.stem, "changes": changes}
        for metric, value in (("peak_memory", measured), ("estimated_peak_memory", row.total)):
            records.append(record(COMMAND, config.model.name, metric, value, "B", 1, **settings))
    if arguments.out:
        write_records(arguments.out, records)


if __name__ == "__main__":
    main()
