"""The end of every evaluation: records to their file, tables to the screen, a picture where one is asked for."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..evaluation.run import Run
from ..report.plot import draw
from ..report.summary import Row, summarise
from ..report.table import tables
from .flags import positive


def add_plot_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="PNG|SVG", help="draw the results: curves, or heatmaps")
    parser.add_argument(
        "--smooth", "--smoothing", type=positive, default=1, metavar="N", help="average curves over N points"
    )


def show(run: Run, records: list[dict[str, Any]], arguments: Namespace) -> list[Row]:
    """Write, print and draw `records` as the flags say; nothing in processes other than the first, which have none."""
    run.finish(records)
    if not records:
        return []
    rows = summarise(records)
    print(tables(rows))
    if arguments.plot is not None:
        draw(arguments.plot, rows, arguments.smooth)
    return rows
