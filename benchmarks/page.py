"""docs/results.md, from recorded results alone."""

from pathlib import Path

from benchmarks.measurements import MEASUREMENTS, Measurement
from longpatch.report.summary import summarise
from longpatch.report.table import tables
from longpatch.results import read_records

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
HEAD = """\
# Results

Written by `python -m benchmarks.evaluations write` from the records in `benchmarks/results/evaluations`; BOOKS is a
folder with books of PG19's test split. float32 on a CPU. Columns: L/G is converted with window L and G sinks, fresh:W
the same text in windows of W tokens that know nothing of each other. Published figures are other models', as their
authors give them. Intervals in brackets are 95 %, by bootstrap over documents.
"""
SKIPPED = ("bits_per_byte", "perplexity, geometric mean of documents")


def write_page(results: Path) -> None:
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: Path) -> str:
    parts = [HEAD]
    for measurement in MEASUREMENTS:
        path = results / f"{measurement.name}.jsonl"
        parts.append(section(measurement, path) if path.exists() else _missing(measurement))
    return "\n".join(parts)


def section(measurement: Measurement, path: Path) -> str:
    records = read_records(path)
    rows = [row for row in summarise(records) if row.metric not in SKIPPED]
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    lines = [f"## {measurement.title}\n", f"    {measurement.command}\n"]
    lines += [f"{text}\n" for text in (measurement.text, measurement.published) if text]
    lines += [tables(rows) + "\n", f"[Records](../benchmarks/results/evaluations/{path.name}), commit {commits}.\n"]
    return "\n".join(lines)


def _missing(measurement: Measurement) -> str:
    return f"## {measurement.title}\n\n    {measurement.command}\n\nNot measured yet.\n"
