"""Peak memory, estimated from the configuration and measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from longpatch.cli import main
from longpatch.finetune import read_config
from longpatch.finetune.estimate import estimate

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "recipes" / "cpu-demo.yaml"


def sizes(*changes, lengths=(1024, 2048)):
    return estimate(read_config(DEMO, list(changes)), list(lengths))


def test_parts_grow_as_they_should():
    short, long = sizes()
    assert long.activations == 2 * short.activations
    assert (long.weights, long.learned) == (short.weights, short.learned)
    batch = sizes("training.per_device_train_batch_size=4")[0]
    assert batch.activations == pytest.approx(4 * short.activations)
    plain = sizes("model.quantization=none")[0]
    assert 3 * short.weights > plain.weights > 1.5 * short.weights  # embeddings are not quantised
    assert sizes("training.gradient_checkpointing=true")[0].activations < 0.6 * short.activations
    assert sizes("lora.r=8")[0].learned < short.learned
    assert sizes("lora.embeddings=true")[0].learned - short.learned == pytest.approx(4096 * 256 * 16)
    assert sizes("model.loss_chunk=256")[0].loss == short.loss / 4


def test_the_command_prints_a_line_for_each_length(capsys):
    assert main(["train", "--estimate", str(DEMO), "--set", "data.length=5000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["length", "1,024", "2,048", "4,096", "5,000"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_the_estimate_is_near_the_measured_peak():
    command = [sys.executable, "-m", "benchmarks.training_memory", str(DEMO), "--lengths", "4096"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ratio = float(done.stdout.split()[-1])
    assert 0.75 < ratio < 1.35, done.stdout
