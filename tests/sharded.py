"""A program for two processes of torchrun: training with every layer's weights shared out (FSDP2, `fully_shard`).

    torchrun --nproc-per-node 2 tests/sharded.py CONFIG.yaml OUT.json

Writes the losses of three steps and the numbers that each rank holds; in one process, without sharding.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from longpatch.data import load_rows, pad_right
from longpatch.finetune import read_config
from longpatch.finetune.model import prepare_model

ROWS, STEPS = 2, 3


def main(path, out):
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config = read_config(path)
    torch.manual_seed(0)  # LoRA starts at random, alike in every process
    model, tokenizer = prepare_model(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if size > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
    rows = load_rows(config.data.train, config.data, tokenizer)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    for step in range(STEPS):
        # From the second row on all have equally many labels, so that the mean over ranks is the mean over rows.
        batch = [rows[1 + step * ROWS + i] for i in range(ROWS) if i % size == rank]
        loss = model.train()(**pad_right(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / size
        if size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    shares = [held]
    if size > 1:
        shares = [None] * size
        dist.all_gather_object(shares, held)
        dist.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps({"losses": losses, "held": shares, "numbers": numbers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
