"""Peak memory, estimated from the configuration and measured."""

from pathlib import Path

import pytest

from benchmarks.training_memory import learner, measure
from longpatch.cli import main
from longpatch.finetune import read_config
from longpatch.finetune.estimate import estimate, mixed_dtype

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "recipes" / "cpu-demo.yaml"


def sizes(*changes, lengths=(1024, 2048)):
    return estimate(read_config(DEMO, list(changes)), list(lengths))


def test_parts_grow_as_they_should():
    short, long = sizes()
    assert long.activations == 2 * short.activations
    assert (long.weights, long.learned) == (short.weights, short.learned)
    one, four = (sizes(f"training.per_device_train_batch_size={batch}")[0] for batch in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations)
    plain = sizes("model.quantization=none")[0]
    assert 4 * short.weights > plain.weights > 2 * short.weights  # embeddings are not quantised
    assert sizes("training.gradient_checkpointing=true")[0].activations < 0.6 * short.activations
    assert sizes("lora.r=8")[0].learned < short.learned
    assert sizes("lora.embeddings=true")[0].learned > short.learned + 4096 * 256 * 16 - 1
    assert sizes("model.loss_chunk=256")[0].loss == short.loss / 4


def test_the_command_prints_a_line_for_each_length(capsys):
    assert main(["train", "--estimate", str(DEMO), "--set", "data.length=5000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["length", "1,024", "2,048", "4,096", "5,000"]


MIXED = ["training.bf16=true", "model.dtype=bfloat16", "model.loss_chunk=64"]
CHECKPOINTS = "training.gradient_checkpointing=true"
CASES = [
    pytest.param(2048, [], id="shifted"),
    pytest.param(2048, ["model.attention=full"], id="full"),
    pytest.param(2048, [CHECKPOINTS], id="checkpoints"),
    pytest.param(256, MIXED, id="mixed"),
    pytest.param(1024, [*MIXED, CHECKPOINTS], id="mixed, checkpoints", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("length", "changes"), CASES)
def test_the_estimate_is_near_the_measured_peak(length, changes):
    config = read_config(DEMO, [*changes, "training.per_device_train_batch_size=1"])
    (row,) = estimate(config, [length])
    measured = measure(*learner(config), 1, length, mixed_dtype(config))
    assert 0.85 < row.total / measured < 1.15
