"""Arms, and runs that end with the same records however they got there."""

import json
from argparse import Namespace

import pytest

from longpatch import LongpatchError, convert_model
from longpatch.cli import flags, main
from longpatch.cli.eval import temp_lora
from longpatch.cli.flags import open_arms
from longpatch.evaluation.arms import Arm, check_arms, converted_arm, parse_arms
from longpatch.evaluation.run import Measurement, Run, Sample
from longpatch.results import read_records
from tests.processes import run_processes
from tests.tiny import tiny_llama

ARMS = [Arm("original"), Arm("16/2", {"local_branch": 16, "global_branch": 2})]
SAMPLES = [Sample({"length": 8 * (i % 2)}, {"trial": i}, i) for i in range(5)]


def test_several_processes_are_told_at_once_that_they_need_a_file(monkeypatch):
    monkeypatch.setattr("longpatch.evaluation.run.process_state", lambda: Namespace(num_processes=2, process_index=0))
    with pytest.raises(LongpatchError, match=r"eval test: several processes.*--out FILE"):
        Run("eval test", "tiny").records(None, ARMS, SAMPLES, measure)


def test_arms_are_read_from_one_line():
    arms = parse_arms(
        "original,1024/10,256/0@512,fresh:64,truncate:2048,constant:a, b,original,", {"implementation": "x"}
    )
    assert [arm.kind for arm in arms] == ["original", "lambda", "lambda", "fresh", "truncate", "constant", "original"]
    assert arms[1].conversion == {
        "implementation": "x", "local_branch": 1024, "global_branch": 10, "limit_distance": None,
        "recall": False,
    }  # fmt: skip
    assert arms[2].conversion["limit_distance"] == 512
    assert (arms[3].window, arms[4].keep, arms[5].answer) == (64, 2048, "a, b")
    with pytest.raises(LongpatchError, match=r"'wrong' is not an arm; 'truncate:x' is not an arm.*original, L/G"):
        parse_arms("wrong,truncate:x")
    with pytest.raises(LongpatchError, match=r"arm 'fresh:64'; arm 'original' twice.*truncate:N"):
        check_arms([arms[0], arms[3], arms[6]], ("original", "truncate"), "eval passkey")


def test_a_split_model_is_not_measured_by_processes_that_share_out_the_samples():
    with pytest.raises(LongpatchError, match=r"eval needle: --tp: several processes.*--device-map auto"):
        open_arms(Namespace(tp=True), None, (), "eval needle")


def test_each_process_opens_the_model_on_its_own_device(monkeypatch):
    opened = []
    monkeypatch.setattr(flags, "load_model", lambda *args, device_map, **options: (opened.append(device_map), None))
    asked = {"model": "x", "dtype": "float32", "peft": None, "load_in_4bit": False}
    asked |= {"rope_method": None, "rope_factor": None, "rope_theta": None}
    for there in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        monkeypatch.setattr(flags, "process_state", lambda: Namespace(device="cuda:3"))
        for device_map, tp in ((None, False), ("cpu", False), (None, True)):
            flags.open_model(Namespace(**asked, device_map=device_map, tp=tp))
    assert opened == [None, "cpu", None, {"": "cuda:3"}, "cpu", None]


def test_a_walk_is_the_work_of_one_process(monkeypatch, capsys):
    monkeypatch.setattr(temp_lora, "process_state", lambda: Namespace(num_processes=2))
    assert main(["eval", "temp-lora", "demo", "nowhere.txt"]) == 2
    assert "several processes" in capsys.readouterr().err


def test_an_arm_is_put_on_and_taken_off():
    model = tiny_llama()
    arm = converted_arm(model, {"local_branch": 16, "global_branch": 4, "limit_distance": 20})
    assert arm.label == "16/4@20"
    assert not hasattr(model, "longpatch")
    with arm.applied(model):
        assert model.longpatch.config.distance == 20
    assert not hasattr(model, "longpatch")
    convert_model(model, 8, 2)
    with Arm("original").applied(model):
        pass
    assert not hasattr(model, "longpatch")


def measure(arm, sample, work):
    windows = arm.conversion["local_branch"] if arm.conversion else 0
    yield Measurement("value", sample.content + windows, detail={"answer": "x"})
    yield Measurement("other", 1.0, "MiB", 3, {"part": 1})


def test_records_of_a_run(tmp_path):
    run = Run("eval test", "tiny", {"dtype": "x"}, 7, tmp_path / "out.jsonl")
    records = run.records(tiny_llama(), ARMS, SAMPLES, measure)
    run.finish(records)
    assert read_records(run.out) == records
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert len(records) == 20
    assert records[2] | {"versions": None, "commit": None} == {
        "command": "eval test", "model": "tiny", "metric": "value", "value": 1, "unit": "1", "n": 1, "seed": 7,
        "settings": {"dtype": "x", "arm": "original", "length": 8}, "versions": None, "commit": None,
        "sample": {"trial": 1}, "detail": {"answer": "x"},
    }  # fmt: skip
    assert [r["value"] for r in records if r["metric"] == "value"] == [0, 1, 2, 3, 4, 16, 17, 18, 19, 20]


def test_a_run_of_nothing_is_refused():
    with pytest.raises(LongpatchError, match="eval test: no samples"):
        Run("eval test", "tiny").records(tiny_llama(), ARMS, [], measure)


@pytest.mark.parametrize("killed_at", [0, 1, 4, 7, 9])
def test_a_killed_run_ends_with_the_same_records(tmp_path, killed_at):
    whole = Run("eval test", "tiny").records(tiny_llama(), ARMS, SAMPLES, measure)
    out = tmp_path / "out.jsonl"
    count = 0

    def dying(arm, sample, work):
        nonlocal count
        count += 1
        if count > killed_at:
            raise KeyboardInterrupt
        return measure(arm, sample, work)

    with pytest.raises(KeyboardInterrupt):
        Run("eval test", "tiny", out=out).records(tiny_llama(), ARMS, SAMPLES, dying)
    part = tmp_path / "out.jsonl.part0"
    with part.open("a", encoding="utf-8") as journal:
        journal.write('["original", 3, [{"value"')  # the line that the kill cut off
    with pytest.raises(LongpatchError, match="left from an unfinished run"):
        Run("eval test", "tiny", out=out).records(tiny_llama(), ARMS, SAMPLES, measure)
    with pytest.raises(LongpatchError, match="belongs to another run"):
        Run("eval test", "tiny", seed=1, out=out, resume=True).records(tiny_llama(), ARMS, SAMPLES, measure)
    measured_again = []

    def counted(arm, sample, work):
        measured_again.append(sample.content)
        return measure(arm, sample, work)

    run = Run("eval test", "tiny", out=out, resume=True)
    records = run.records(tiny_llama(), ARMS, SAMPLES, counted)
    assert records == whole
    assert len(measured_again) == 10 - killed_at
    run.finish(records)
    assert read_records(out) == whole


def test_a_run_is_not_resumed_on_another_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("A text that is read to its end. " * 4, encoding="utf-8")
    asked = ["eval", "perplexity", "demo", "text.txt", "--no-convert", "--out", "out.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", interrupted)
        assert main(asked) == 130
    text.write_text("A text that is read to its last." * 4, encoding="utf-8")
    assert main([*asked, "--resume"]) == 2
    assert "belongs to another run" in capsys.readouterr().err


def interrupted(*args):
    raise KeyboardInterrupt


def test_two_processes_give_the_records_of_one(tmp_path):
    """Over gloo, by torchrun: on CPUs `accelerate launch` itself starts several processes by MPI only."""
    (tmp_path / "texts").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "texts" / f"{name}.txt").write_text(
            f"A text about {name}, and some more of it. " * 12, encoding="utf-8"
        )
    shared = [
        "eval", "perplexity", "demo", str(tmp_path / "texts"), "--local-branch", "32",
        "--baseline", "original", "--bucket", "40",
    ]  # fmt: skip
    assert main([*shared, "--out", str(tmp_path / "one.jsonl")]) == 0
    run_processes(["-m", "longpatch.cli", *shared, "--out", tmp_path / "two.jsonl"], tmp_path / "logs")
    one, two = (read_records(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert len(one) > 12
    assert [json.dumps(r) for r in one] == [json.dumps(r) for r in two]
