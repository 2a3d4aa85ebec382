"""Training with every layer's weights shared out over two processes (FSDP2)."""

import json
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, run_processes, run_python
from tests.test_train import write_base, write_config

PROGRAM = Path(__file__).with_name("sharded.py")


def test_two_ranks_hold_half_each_and_learn_the_same(tmp_path):
    write_base(tmp_path)
    config = write_config(tmp_path, lora={"dropout": 0.0})
    run_python([PROGRAM, config, tmp_path / "one.json"], OMP_NUM_THREADS="1")
    run_processes([PROGRAM, config, tmp_path / "two.json"], tmp_path / "logs")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
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
    config = write_config(tmp_path, batch=1, lora={"dropout": 0.0}, training={"use_cpu": False, "bf16": True})
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "examples" / "launch" / "fsdp2.yaml"]
    run_python([*launcher, "-m", "longpatch.cli", "train", config])
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
