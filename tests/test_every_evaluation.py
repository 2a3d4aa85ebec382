"""What holds for every evaluation: a bar, --limit, --seed, --resume, and the work of several processes."""

import copy
import json
from types import SimpleNamespace

import pytest

from longpatch.cli import eval as evaluations
from longpatch.cli import flags, main
from longpatch.demo import load
from longpatch.evaluation.run import Journal
from longpatch.temp_lora.learner import Learner
from tests.every_evaluation import COMMANDS, arguments_of, read, write_files
from tests.processes import run_processes

SHARED = [name for name in COMMANDS if name != "temp-lora"]  # which walks, with a state of its own
DRAWN = ("passkey", "needle", "topic", "distance", "translation")  # the last with an adapter that learns


def watch(patch, owner, name, dies_at=None):
    """The calls of a method; that of number `dies_at` is where Ctrl-C is pressed."""
    method, calls = getattr(owner, name), []

    def watched(*args, **options):
        calls.append(args)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return method(*args, **options)

    patch.setattr(owner, name, watched)
    return calls


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request, tmp_path_factory):
    """A whole run of each command: its name, folder and records; the method that makes a step, and how many it took."""
    if request.param in ("generation", "translation"):
        pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    folder, (model, tokenizer) = tmp_path_factory.mktemp(request.param), load()
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(flags, "load_model", lambda *args, **options: (copy.deepcopy(model), tokenizer))
        step = (Learner, "learn") if request.param == "temp-lora" else (Journal, "add")
        with patch.context() as counting:
            steps = watch(counting, *step)
            assert main([*arguments_of(request.param), "--out", "whole.jsonl"]) == 0
        records = read(folder / "whole.jsonl")
        yield SimpleNamespace(name=request.param, folder=folder, records=records, step=step, steps=len(steps))


def test_every_command_is_here():
    assert set(COMMANDS) == set(evaluations.COMMANDS)


def test_the_first_sample_under_another_seed(whole, capsys):
    arguments = [*arguments_of(whole.name), "--limit", "1", "--seed", "7", "--out", "one.jsonl"]
    assert main(arguments) == 0
    shown, records = capsys.readouterr().err, read(whole.folder / "one.jsonl")
    assert ({r["seed"] for r in whole.records}, {r["seed"] for r in records}) == ({0}, {7})
    if whole.name == "temp-lora":
        assert "a: 100%" in shown
        assert {r["settings"]["text"] for r in records} == {"a.txt"}
        return
    assert f"eval {whole.name}: 100%" in shown
    one = [r for r in records if "sample" in r]
    every = [r | {"seed": 7} for r in whole.records if "sample" in r]
    assert len(every) == len(one) * whole.steps
    assert whole.steps >= 3
    assert (one == every[: len(one)]) == (whole.name not in DRAWN)


def test_a_killed_run_ends_with_the_same_records(whole, monkeypatch):
    out, arguments = whole.folder / "out.jsonl", [*arguments_of(whole.name), "--out", "out.jsonl", "--resume"]
    dies_at, kept = 3, 2
    if whole.name == "temp-lora":
        arguments.append("walk")
        dies_at, kept = 6, 4  # of each text that was read: a state by the minute would come too late here
    with monkeypatch.context() as patch:
        watch(patch, *whole.step, dies_at=dies_at)
        assert main(arguments) == 130
    assert not out.exists()
    steps = watch(monkeypatch, *whole.step)
    assert main(arguments) == 0
    assert read(out) == whole.records
    assert len(steps) == whole.steps - kept


PROGRAM = """
import json, sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import group

from longpatch.cli import main
from longpatch.evaluation.run import Journal, process_state
from tests.every_evaluation import arguments_of

add, added = Journal.add, []
Journal.add = lambda self, *args: (added.append(args), add(self, *args))
for name in sys.argv[1:]:
    assert main([*arguments_of(name), "--baseline", "original", "--out", f"{name}.two.jsonl"]) == 0
waits = group.WORLD._get_backend(torch.device("cpu")).options._timeout
assert waits > timedelta(days=1), waits
Path(f"process{process_state().process_index}.json").write_text(json.dumps(len(added)))
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_the_records_of_one(tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    run_processes(["program.py", *SHARED], tmp_path / "logs")
    added = watch(monkeypatch, Journal, "add")
    for name in SHARED:
        assert main([*arguments_of(name), "--baseline", "original", "--out", f"{name}.jsonl"]) == 0
        assert read(tmp_path / f"{name}.two.jsonl") == read(tmp_path / f"{name}.jsonl"), name
    first, second = (json.loads((tmp_path / f"process{n}.json").read_text()) for n in range(2))
    assert first + second == len(added)
    assert abs(first - second) <= 2 * len(SHARED)  # arms
