"""The end of every evaluation: records to their file, tables to the screen."""

from typing import Any

from ..evaluation.run import Run
from ..report.summary import summarise
from ..report.table import tables


def show(run: Run, records: list[dict[str, Any]]) -> None:
    """Write and print `records`; nothing in processes other than the first, which have none."""
    run.finish(records)
    if records:
        print(tables(summarise(records)))
