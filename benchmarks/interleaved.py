"""Timing of peers in turns within one process, each only after its result was checked; one JSON line a measurement."""

import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import getloadavg
from pathlib import Path

import torch
from tqdm import tqdm

from longpatch.results import record


@dataclass
class Peer:
    """One way to do a case's work: `run` is what is timed, `verify` raises if its result is wrong."""

    name: str
    run: Callable[[], object]
    verify: Callable[[], None]


@dataclass
class Case:
    """One table row: `setup` makes the inputs and returns the peers, the baseline first."""

    name: str
    settings: dict
    setup: Callable[[], list[Peer]]


def measure(
    cases: Iterable[Case],
    rounds: int,
    seconds: float,
    output: Path | None,
    command: str = "benchmarks.attention",
    model: str = "lambda_attention",
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict]:
    """Records of all cases: every peer is verified, then timed once a round, the order turning by one each round.

    A case stops after `rounds` rounds, or after `seconds` once it has three.
    """
    records = []
    bar = tqdm(list(cases), unit="case")
    for case in bar:
        bar.set_description(case.name)
        torch.manual_seed(0)
        peers = case.setup()
        first_ms = {peer.name: _milliseconds(peer.verify, clock) for peer in peers}
        times = {peer.name: [] for peer in peers}
        started = time.perf_counter()
        for turn in range(rounds):
            if turn >= 3 and time.perf_counter() - started > seconds:
                break
            for index in range(len(peers)):
                peer = peers[(index + turn) % len(peers)]
                times[peer.name].append(_milliseconds(peer.run, clock))
        baseline = _quantile(times[peers[0].name], 0.5)
        for peer in peers:
            line = _record(case, peer.name, times[peer.name], baseline, first_ms[peer.name], command, model)
            records.append(line | {"clock": clock.__name__})
            if output:
                with output.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    return records


def table(records: list[dict]) -> str:
    """Markdown: a row a case, a column a peer, median milliseconds and how many times faster than the baseline."""
    peers = list(dict.fromkeys(line["settings"]["peer"] for line in records))
    cells: dict[str, dict[str, str]] = {}
    for line in records:
        text = f"{line['value']:.3g} ({line['speedup']:.2f}x)"
        cells.setdefault(line["settings"]["case"], {})[line["settings"]["peer"]] = text
    lines = ["| case | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
    lines += [f"| {case} | " + " | ".join(row.get(peer, "") for peer in peers) + " |" for case, row in cells.items()]
    return "\n".join(lines)


def _milliseconds(function: Callable, clock: Callable[[], float]) -> float:
    started = clock()
    function()
    return 1000 * (clock() - started)


def _quantile(times: list[float], fraction: float) -> float:
    return torch.tensor(times, dtype=torch.float64).quantile(fraction).item()


def _record(
    case: Case, peer: str, times: list[float], baseline_ms: float, first_ms: float, command: str, model: str
) -> dict:
    median = _quantile(times, 0.5)
    settings = {"case": case.name, "peer": peer, **case.settings}
    line = record(command, model, "latency", median, "ms", len(times), seed=0, **settings)
    line["versions"]["python"] = platform.python_version()
    return line | {
        "p20": _quantile(times, 0.2),
        "p80": _quantile(times, 0.8),
        "speedup": baseline_ms / median,
        "first_call_ms": first_ms,
        "load_average": getloadavg()[0],
        "device": f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
