"""What all evaluations share: samples through arms into records, resumable, in one process or several."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ..errors import LongpatchError
from ..results import record, write_records
from .arms import Arm


@dataclass(frozen=True)
class Sample:
    """One thing to measure.

    Attributes:
        settings: what results are grouped by, JSON values: {"length": 256, "depth": 0.5}.
        identity: what tells it from all others of the same settings, in other runs too: a name, JSON values, and the
            `digest` of its content; kept in its records.
        content: what the measure needs; not recorded.
        size: its share of the work, in any unit.
    """

    settings: dict[str, Any]
    identity: dict[str, Any]
    content: Any = None
    size: int = 1


def digest(*contents: Any) -> str:
    """12 digits that tell contents from others: texts, bytes, token ids [n], JSON values."""
    whole = hashlib.sha256()
    for content in contents:
        data = content.cpu().numpy().tobytes() if isinstance(content, Tensor) else content
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        whole.update(f"{len(data)}:".encode() + data)
    return whole.hexdigest()[:12]


@dataclass(frozen=True)
class Measurement:
    """One measured value of a sample.

    Attributes:
        n: what it is a mean over.
        settings: what it is grouped by, beside the sample's settings.
        detail: what else is to be kept of it, such as the answer that was given.
        part: which part of the sample it is of, where a sample has several.
    """

    metric: str
    value: float
    unit: str = "1"
    n: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    part: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a measure is handed beside its sample.

    Attributes:
        tick: call it with the amount of work done, for the progress bar.
        state: folder where a long sample may keep what it needs to go on after a kill; None if nothing is kept.
    """

    tick: Callable[[int], Any]
    state: Path | None = None


def process_state() -> PartialState:
    """The processes of this run; without a CUDA device accelerate joins them only where it is told to use the CPU.

    One that is done early waits for the others as long as it takes, not ten minutes.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(weeks=52))


Measure = Callable[[Arm, Sample, Work], Iterable[Measurement]]


@dataclass(frozen=True)
class Run:
    """One run of one evaluation.

    Attributes:
        command: its name, as in "eval passkey".
        model_name: the MODEL of the command line.
        settings: settings that all its records share.
        out: JSON lines file for the records; None keeps nothing.
        resume: go on with the unfinished run that left its journal beside `out`.
        asked: whatever else must agree for two runs to be one; not recorded.
    """

    command: str
    model_name: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    out: Path | None = None
    resume: bool = False
    asked: dict[str, Any] = field(default_factory=dict)

    def records(self, model, arms: Sequence[Arm], samples: Sequence[Sample], measure: Measure) -> list[dict[str, Any]]:
        """Measure every sample through every arm; the records of all, in order of arms and samples.

        Under `accelerate launch` each process takes its share of the samples; process 0 returns (and writes) all of
        them, the others an empty list. A journal beside `out` takes one line per finished sample, so that a killed run
        goes on where it was and ends with the same records.

        Raises:
            LongpatchError: where there is nothing to measure; for a journal of another run; for several processes
                without `out`.
        """
        if not samples:
            raise LongpatchError(self.command, ["no samples"])
        processes = process_state()
        if processes.num_processes > 1 and self.out is None:
            raise LongpatchError(self.command, ["several processes have no common file to write to"], "--out FILE")
        journal = Journal(self, arms, samples, processes.process_index)
        share = range(processes.process_index, len(samples), processes.num_processes)
        todo = [(arm, i) for arm in arms for i in share if (arm.label, i) not in journal.done]
        total = sum(samples[i].size for _, i in todo)
        with tqdm(
            total=total, unit_scale=True, disable=not processes.is_main_process, mininterval=1, desc=self.command
        ) as progress:
            for arm in arms:
                mine = [i for todo_arm, i in todo if todo_arm is arm]
                if not mine:
                    continue
                progress.set_postfix_str(arm.label)
                with arm.applied(model):
                    for i in mine:
                        before = progress.n
                        work = Work(progress.update, journal.state_folder)
                        journal.add(arm, i, [self._record(arm, samples[i], m) for m in measure(arm, samples[i], work)])
                        progress.update(samples[i].size - (progress.n - before))
        journal.close()
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return []
        done = journal.everything()
        return [line for arm in arms for i in range(len(samples)) for line in done[arm.label, i]]

    def finish(self, records: list[dict[str, Any]]) -> None:
        """Write `records` to `out` and take the journals away; does nothing in processes other than the first."""
        if self.out is None or not process_state().is_main_process:
            return
        write_records(self.out, records)
        for path in self.journals():
            path.unlink()

    def journals(self) -> list[Path]:
        return [] if self.out is None else sorted(self.out.parent.glob(f"{self.out.name}.part*"))

    def group_record(self, metric: str, value: float, unit: str, n: int, settings: dict[str, Any]) -> dict[str, Any]:
        """A record about many samples at once."""
        return record(self.command, self.model_name, metric, value, unit, n, seed=self.seed, **settings)

    def _record(self, arm: Arm, sample: Sample, measured: Measurement) -> dict[str, Any]:
        settings = self.settings | {"arm": arm.label} | sample.settings | measured.settings
        line = self.group_record(measured.metric, measured.value, measured.unit, measured.n, settings)
        return (
            line
            | {"sample": sample.identity | measured.part}
            | ({"detail": measured.detail} if measured.detail else {})
        )


class Journal:
    """Finished samples of a run, one line each, in `OUT.part<process>`; a line that was cut off does not count."""

    def __init__(self, run: Run, arms: Sequence[Arm], samples: Sequence[Sample], process: int):
        self.run, self.process = run, process
        self.done: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._file = None
        self._identity = _identity(run, arms, samples)
        if run.out is None:
            return
        found = run.journals()
        if found and not run.resume:
            raise LongpatchError(
                "--out", [f"{found[0]} is left from an unfinished run"], "--resume, another --out, or removing it"
            )
        self.done = self.everything()
        process_state().wait_for_everyone()
        run.out.parent.mkdir(parents=True, exist_ok=True)
        path = run.out.with_name(f"{run.out.name}.part{process}")
        if process >= len(found) or not path.exists():
            assert self.state_folder is not None
            shutil.rmtree(self.state_folder, ignore_errors=True)  # of a run that is not gone on with
            path.write_text(json.dumps(self._identity) + "\n", encoding="utf-8")
        else:
            _drop_cut_line(path)
        self._file = path.open("a", encoding="utf-8")

    @property
    def state_folder(self) -> Path | None:
        return None if self.run.out is None else self.run.out.with_name(f"{self.run.out.name}.state{self.process}")

    def add(self, arm: Arm, index: int, records: list[dict[str, Any]]) -> None:
        self.done[arm.label, index] = records
        if self._file is not None:
            self._file.write(json.dumps([arm.label, index, records]) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def everything(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """What all processes have finished."""
        done = dict(self.done)
        for path in self.run.journals():
            head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            if not head.endswith("\n") or json.loads(head) != self._identity:
                raise LongpatchError("--resume", [f"{path} belongs to another run"], "the same command as before")
            for line in lines:
                if line.endswith("\n"):
                    label, index, records = json.loads(line)
                    done[label, index] = records
        return done


def _identity(run: Run, arms: Sequence[Arm], samples: Sequence[Sample]) -> dict[str, Any]:
    """What must agree for two runs to be one."""
    described = json.dumps([[sample.settings, sample.identity, sample.size] for sample in samples], sort_keys=True)
    return {
        "command": run.command,
        "model": run.model_name,
        "settings": run.settings,
        "seed": run.seed,
        "arms": [arm.label for arm in arms],
        "samples": hashlib.sha256(described.encode()).hexdigest(),
        "asked": hashlib.sha256(json.dumps(run.asked, sort_keys=True).encode()).hexdigest(),
    }


def _drop_cut_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
