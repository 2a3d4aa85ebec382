"""docs/results.md, from recorded results alone."""

from pathlib import Path

from benchmarks.measurements import MEASUREMENTS, Measurement
from longpatch.report.plot import draw
from longpatch.report.summary import summarise
from longpatch.report.table import tables
from longpatch.results import read_records

DOCS = Path(__file__).parent.parent / "docs"
HEAD = """\
# Results

Written by `python -m benchmarks.evaluations write` from the records in `benchmarks/results/evaluations`; BOOKS is a
folder with books of PG19's test split. float32 on a CPU. Columns: L/G is converted with window L and G sinks, fresh:W
the same text in windows of W tokens that know nothing of each other. Published figures are other models', as their
authors give them. Intervals in brackets are 95 %: Wilson's for shares, else by bootstrap over samples. The last span of
older records is named by where the text ended, of newer ones by its edge.
"""
SKIPPED = ("bits_per_byte", "nll_variance", "cache", "perplexity, geometric mean of documents")


def write_page(results: Path) -> None:
    """Write docs/results.md and its pictures from the JSON lines under `results`."""
    (DOCS / "results.md").write_text(page(results, DOCS / "figures"), encoding="utf-8")


def page(results: Path, figures: Path) -> str:
    return "\n".join([HEAD, *(section(measurement, results, figures) for measurement in MEASUREMENTS)])


def section(measurement: Measurement, results: Path, figures: Path) -> str:
    """Title, commands, published figure, tables and picture of one measurement; or that it has no records."""
    lines = [f"## {measurement.title}\n", *(f"    {line}" for line in measurement.command.splitlines()), ""]
    lines += [f"{text}\n" for text in (measurement.text, measurement.published) if text]
    paths = sorted(results.glob(measurement.records or f"evaluations/{measurement.name}.jsonl"))
    records = [record for path in paths for record in read_records(path)]
    if not records:
        return "\n".join([*lines, "Not measured yet.\n"])
    for record in records:
        for name in measurement.hidden:
            record["settings"].pop(name, None)
    rows = [row for row in summarise(records) if _shown(row.metric, measurement)]
    lines.append(tables(rows) + "\n")
    if measurement.figure:
        figures.mkdir(exist_ok=True)
        draw(figures / f"{measurement.name}.png", rows)
        lines.append(f"![{measurement.title}](figures/{measurement.name}.png)\n")
    links = ", ".join(f"[{path.name}](../benchmarks/results/{path.relative_to(results)})" for path in paths)
    commits = ", ".join(sorted({record["commit"] or "(not recorded)" for record in records}))
    return "\n".join([*lines, f"Records: {links}, commit {commits}.\n"])


def _shown(metric: str, measurement: Measurement) -> bool:
    return metric in measurement.metrics if measurement.metrics else metric not in SKIPPED
