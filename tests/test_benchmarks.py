"""Everything in the benchmarks that needs no GPU: formulas, arguments, checks, tables."""

import json
from itertools import count

import pytest
import torch

from benchmarks import gpu
from benchmarks.roofline import Shape, backward_flops, decode_bytes, forward_flops, pairs, prefill_bytes

SMALL = Shape(1, 4, 2, 16, 40, 9, 3)


@pytest.mark.parametrize("window", [1, 9, 40, 100])
def test_pairs_are_counted_one_by_one(window):
    shape = SMALL._replace(window=window)
    near = sum(0 <= i - j < window for i in range(40) for j in range(40))
    far = sum(i - j >= window for i in range(40) for j in range(3))
    assert pairs(shape) == near + far


def test_roofline_of_the_long_prefill():
    """8.68 TFLOP: 32 heads of 128, 131,072 tokens, a window of 4,096, ten sinks."""
    shape = Shape(1, 32, 8, 128, 131_072, 4096, 10)
    assert forward_flops(shape) / 1e12 == pytest.approx(8.68, abs=0.01)
    assert backward_flops(shape) == 2.5 * forward_flops(shape)
    assert prefill_bytes(shape) == 2 * 131_072 * 128 * (3 * 32 + 2 * 8) + 4 * 131_072 * 32
    assert decode_bytes(shape) == 4 * 8 * (4096 + 10) * 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device")
def test_without_a_gpu_one_clear_line(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.gpu: no CUDA device found; nothing was measured\n"


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--quick", "--tune", "--out"))


def test_a_wrong_result_gets_no_time(monkeypatch):
    assert gpu.check("cpu", "blocked", SMALL, torch.float32) < 1e-5
    honest = gpu.lambda_attention

    def wrong(*, implementation, **arguments):
        out, lse = honest(**arguments, implementation=implementation)
        return (out * 1.1 if implementation == "blocked" else out), lse

    monkeypatch.setattr(gpu, "lambda_attention", wrong)
    with pytest.raises(RuntimeError, match=r"blocked is off by .* no time is reported"):
        gpu.check("cpu", "blocked", SMALL, torch.float32)


def test_times_take_turns_and_become_a_table(tmp_path):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("ours", "peer")}
    clock = count(1)

    def timer(call, repeats):
        call()
        return [next(clock) / 1000] * repeats

    times = gpu.time_calls(calls, 4, timer)
    assert order[-8:] == ["ours", "peer"] * 4
    assert times["ours"]["seconds"] == pytest.approx(0.004)
    rows = gpu.rate_rows("forward", SMALL, times, 1e9, "TFLOP/s", 1e12)
    rows.append({"kind": "memory", "shape": str(SMALL), "name": "ours", "extra_bytes": 2**20})
    path = gpu.write(rows, "Some GPU", tmp_path)
    assert path.name == "Some_GPU.json"
    assert json.loads(path.read_text())[1]["relative"] == pytest.approx(1.25)
    lines = path.with_suffix(".md").read_text().splitlines()
    assert lines[2].startswith("| forward | B1 H4/2 d16 n40 L9 G3 | ours | 4.000 (")
    assert lines[3].endswith("| 1.25x |")
    assert "1.0 MiB extra" in lines[4]
