"""The end of every evaluation: records to their file, tables to the screen, a picture where one is asked for."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from ..evaluation.run import Run
from ..report.plot import draw
from ..report.summary import summarise
from ..report.table import tables


def add_plot_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="PNG|SVG", help="draw the results: curves, or heatmaps")


def show(run: Run, records: list[dict[str, Any]], plot: Path | None = None) -> None:
    """Write, print and draw `records`; nothing in processes other than the first, which have none."""
    run.finish(records)
    if not records:
        return
    rows = summarise(records)
    print(tables(rows))
    if plot is not None:
        draw(plot, rows)
