"""Everything in the benchmarks that needs no GPU: formulas, arguments, checks, tables."""

import json
from itertools import count

import pytest
import torch

from benchmarks import evaluations, gpu, page
from benchmarks.measurements import MEASUREMENTS
from benchmarks.roofline import Shape, backward_flops, decode_bytes, forward_flops, pairs, prefill_bytes
from longpatch.results import read_records, record, write_records
from longpatch_kernels.triton import tuning

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


def test_what_fails_is_a_row_and_costs_no_other(monkeypatch, tmp_path, capsys):
    def broken(arguments, shape):
        raise RuntimeError("out of memory\nand more")

    def wrong(arguments, shape):
        return lambda: torch.zeros_like(arguments["query"])

    def window_only(arguments, shape):
        return lambda: honest(*(arguments[name] for name in ("query", "key", "value")), window=shape.window)[0]

    honest = gpu.lambda_attention
    arguments = gpu.tensors(SMALL, torch.float32, "cpu")
    monkeypatch.setattr(gpu, "lambda_attention", lambda implementation, **rest: honest(**rest))
    monkeypatch.setattr(
        gpu, "PEERS", {"broken": (broken, True), "wrong": (wrong, True), "window": (window_only, False)}
    )
    calls, failed = gpu.prepared_peers(arguments, SMALL)
    assert list(calls) == ["window"]
    assert [row["name"] for row in failed] == ["broken", "wrong"]
    assert failed[0]["error"] == "RuntimeError: out of memory"

    written = []
    good = {"kind": "memory", "shape": "s", "name": "ours", "extra_bytes": 1}
    measures = [lambda shape: [good], lambda shape: broken(None, shape), lambda shape: [good]]
    monkeypatch.setattr(gpu, "measurements", lambda quick, repeats: [("any", entry, SMALL) for entry in measures])
    monkeypatch.setattr(gpu, "write", lambda rows, name, folder: written.append(len(rows)))
    monkeypatch.setattr(gpu, "check", lambda device: 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert gpu.main([]) == 1
    assert written == [1, 2, 3]
    assert "failed: RuntimeError: out of memory |" in capsys.readouterr().out


def test_the_fastest_candidate_of_each_kernel_is_kept(monkeypatch, tmp_path):
    from benchmarks import tune

    order = []
    two = [tuning.INTERPRETED, tuning.INTERPRETED]
    monkeypatch.setattr(tuning, "candidates", lambda kernel, *about: two if kernel in ("forward", "key") else two[:1])
    monkeypatch.setattr(tuning, "measured_path", lambda chip: tmp_path / "tuned.json")
    monkeypatch.setattr(tune, "_call", lambda kernel, *about: lambda: order.append(tuning.measured("interpreter")))
    clock = count(9, -1)
    found = tune.tune(SMALL, 2, lambda call, repeats: [next(clock)] * repeats, "cpu")
    tuning.measured.cache_clear()
    assert json.loads((tmp_path / "tuned.json").read_text()) == found
    assert {name.split()[0] for name in found} == {"forward", "key"}
    assert len(found) == 2 * 2 * 3
    assert set(found.values()) == {1}


def test_the_page_of_results_shows_every_record_with_its_command(tmp_path, monkeypatch):
    shown = ("demo-far", "demo-needle", "temp-lora")
    monkeypatch.setattr(page, "MEASUREMENTS", [m for m in MEASUREMENTS if m.name in shown])
    (tmp_path / "evaluations").mkdir()
    marks = [
        record("eval needle", "demo", metric, 0.25, "1", 1, arm="256/4", length=length, depth=0.5)
        | {"sample": {"trial": trial}}
        for metric in ("rougeL", "similar")
        for length in (256, 512)
        for trial in (0, 1)
    ]
    write_records(tmp_path / "evaluations" / "demo-needle.jsonl", marks)
    walk = [record("eval temp-lora", "demo", "perplexity", 40.0, "1", 9, arm=arm, learn={"rank": 4}) for arm in "ab"]
    write_records(tmp_path / "temp_lora_books.jsonl", walk)
    text = page.page(tmp_path, tmp_path / "figures")
    far, needle, learned = text.split("\n## ")[1:]
    assert "Not measured yet." in far
    assert needle.startswith("Needle, small model\n\n    longpatch eval needle demo BOOKS")
    assert "| 512 | 0.25 |" in needle
    assert "similar" not in needle
    assert (tmp_path / "figures" / "demo-needle.png").stat().st_size > 5000
    assert "| 40 | 40 |" in learned
    assert "'rank'" not in learned


def test_every_recorded_evaluation_has_its_section():
    recorded = {path.stem for path in (evaluations.RESULTS / "evaluations").glob("*.jsonl")}
    assert recorded <= {measurement.name for measurement in MEASUREMENTS}
    for name in recorded:
        records = read_records(evaluations.RESULTS / "evaluations" / f"{name}.jsonl")
        (measurement,) = [m for m in MEASUREMENTS if m.name == name]
        assert {r["command"] for r in records} == {" ".join(measurement.command.split()[1:3])}
