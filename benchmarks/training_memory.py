"""Peak memory of one training step on the CPU beside what `longpatch train --estimate` says.

    python -m benchmarks.training_memory examples/recipes/cpu-demo.yaml --lengths 1024 4096
    python -m benchmarks.training_memory examples/recipes/smollm2-32k.yaml --lengths 256 1024 --cpu

Each length is measured in a fresh process: the bytes of weights, gradients and optimiser state, and what forward and
backward of random tokens raised the resident memory by at most. `--set` changes the recipe.
"""

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import torch

from longpatch.finetune import read_config
from longpatch.finetune.estimate import estimate
from longpatch.finetune.model import prepare_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.training_memory"
ON_CPU = ["training.bf16=false", "training.fp16=false", "training.optim=adamw_torch", "model.dtype=float32"]


def resident(name):
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def measure(config, length):
    """Bytes at the peak of one step on rows of `length` tokens."""
    model, tokenizer = prepare_model(config)
    if config.training.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    batch = config.training.get("per_device_train_batch_size", 8)

    def step(count):
        ids = torch.randint(0, len(tokenizer), (batch, count))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step(8)  # everything is imported, and the optimiser's state is there
    gc.collect()
    state = [tensor for held in optimizer.state.values() for tensor in held.values()]
    kept = [*model.parameters(), *model.buffers(), *(p.grad for p in learned), *state]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident("VmRSS")
    step(length)
    return sum(storages.values()) + resident("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--cpu", action="store_true", help="in float32, with PyTorch's AdamW")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE")
    parser.add_argument("--out", type=Path, metavar="JSONL")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    changes = [*(ON_CPU if arguments.cpu else []), *arguments.set]
    config = read_config(arguments.config, changes)
    if arguments.measure:
        print(measure(config, arguments.lengths[0]))
        return
    records = []
    for row in estimate(config, arguments.lengths):
        command = [sys.executable, "-m", "benchmarks.training_memory", str(arguments.config), "--measure"]
        command += ["--lengths", str(row.length), *(f"--set={change}" for change in changes)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        measured = int(done.stdout.split()[-1])
        print(
            f"{row.length:>8} tokens: estimated {row.total / 2**20:>9.1f} MiB, measured {measured / 2**20:>9.1f} MiB, "
            f"ratio {row.total / measured:.2f}",
            flush=True,
        )
        settings = {"length": row.length, "recipe": arguments.config.stem, "changes": changes}
        for metric, value in (("peak_memory", measured), ("estimated_peak_memory", row.total)):
            records.append(record(COMMAND, config.model.name, metric, value, "B", 1, **settings))
    if arguments.out:
        write_records(arguments.out, records)


if __name__ == "__main__":
    main()
