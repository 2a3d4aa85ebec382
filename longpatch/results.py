"""The one format of everything that measures: JSON lines."""

import functools
import json
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import LongpatchError

DESCRIBE = ("describe", "--always", "--dirty=+", "--exclude=*")
FIELDS = ("command", "model", "settings", "metric", "value", "unit", "n")
SUPPORTED = "JSON lines as --out writes them"
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
    """What `write_records` wrote.

    Raises:
        LongpatchError: for a file that cannot be read, naming the line that is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LongpatchError("records", [f"{path} cannot be read: {error}"], SUPPORTED) from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
            missing = [name for name in FIELDS if name not in records[-1]]
        except (ValueError, TypeError, RecursionError) as error:
            raise LongpatchError("records", [f"{path}:{number} is no JSON object: {error}"], SUPPORTED) from error
        if missing:
            raise LongpatchError("records", [f"{path}:{number} has no {', '.join(missing)}"], SUPPORTED)
    return records


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
