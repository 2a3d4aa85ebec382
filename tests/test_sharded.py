"""Training with every layer's weights shared out over two processes (FSDP2)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_train import ROOT, write_base, write_config

PROGRAM = Path(__file__).with_name("sharded.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(launcher, config, out):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, *launcher, str(PROGRAM), str(config), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_two_ranks_hold_half_each_and_learn_the_same(tmp_path):
    write_base(tmp_path)
    config = write_config(tmp_path, lora={"dropout": 0.0})
    one = run([], config, tmp_path / "one.json")
    two = run(TWO, config, tmp_path / "two.json")
    torch.testing.assert_close(two["losses"], one["losses"], atol=1e-5, rtol=0)
    assert one["losses"][2] < one["losses"][0] - 0.1
    assert one["held"] == [one["numbers"]]
    assert sum(two["held"]) == two["numbers"] == one["numbers"]
    for held in two["held"]:
        assert 0.45 < held / one["numbers"] < 0.55


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate shards with FSDP on GPUs only: two are needed")
def test_accelerate_shards_by_the_file_that_is_shipped(tmp_path):
    write_base(tmp_path)
    training = {"use_cpu": False, "bf16": True}
    config = write_config(tmp_path, batch=1, lora={"dropout": 0.0}, training=training)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/launch/fsdp2.yaml"]
    command = [*launcher, "-m", "longpatch.cli", "train", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
