"""The one format of everything that measures: JSON lines."""

import functools
import json
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

DESCRIBE = ("describe", "--always", "--dirty=+", "--exclude=*")
VERSIONED = ("longpatch", "torch", "transformers")


def record(
    command: str, model: str, metric: str, value: float, unit: str, n: int, *, seed: int | None = None, **settings: Any
) -> dict[str, Any]:
    """One measured value: `n` is the number of samples behind it, `settings` what it was measured under.

    Evaluations add two keys to the record of a single sample: "sample", what tells it from the others, and "detail",
    what else is worth keeping, such as the answer.
    """
    return {
        "command": command,
        "model": model,
        "settings": settings,
        "metric": metric,
        "value": value,
        "unit": unit,
        "n": n,
        "seed": seed,
        "versions": dict(_versions()),
        "commit": _commit(),
    }


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@functools.cache
def _versions() -> dict[str, str]:
    return {package: version(package) for package in VERSIONED}


@functools.cache
def _commit() -> str | None:
    """The commit of the checkout this runs from, "+" where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), *DESCRIBE], capture_output=True, text=True)
    return done.stdout.strip() or None
