"""Summaries as pictures: curves over a length, heatmaps over length and depth, bars for the rest."""

from pathlib import Path
from typing import Any

import numpy

from ..errors import LongpatchError
from .summary import Cell, Row
from .table import varying

X_AXES = ("stop", "length", "position", "distance", "sinks")
SUFFIXES = (".png", ".svg", ".pdf")


def draw(path: Path, rows: list[Row], smooth: int = 1) -> None:
    """Write one picture with a panel for each metric, for each arm too where it is a heatmap.

    `smooth` averages curves over so many neighbouring points.
    """
    from matplotlib.figure import Figure

    if path.suffix not in SUFFIXES:
        raise LongpatchError("--plot", [f"{path} has no known suffix"], ", ".join(SUFFIXES))
    panels = _panels(rows)
    if not panels:
        raise LongpatchError("--plot", ["no results"])
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.5 * across, 3.8 * down), layout="constrained")
    grid = numpy.atleast_1d(figure.subplots(down, across, squeeze=False)).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (title, found, column) in zip(grid, panels, strict=False):
        if column is not None:
            _heatmap(figure, axes, found, column)
        elif _axis(found):
            _curves(axes, found, _axis(found) or "", smooth)
        else:
            _bars(axes, found)
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)


def _panels(rows: list[Row]) -> list[tuple[str, list[Row], str | None]]:
    """(title, rows, column of a heatmap) of each panel."""
    panels = []
    metrics: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        metrics.setdefault((row.command, row.metric), []).append(row)
    for (command, metric), found in metrics.items():
        if all({"length", "depth"} <= set(row.settings) for row in found):
            columns = dict.fromkeys(column for row in found for column in row.cells)
            panels += [(f"{command}: {metric}, {column}", found, column) for column in columns]
        else:
            panels.append((f"{command}: {metric}", found, None))
    return panels


def _axis(rows: list[Row]) -> str | None:
    """The setting that takes several numeric values in all rows."""
    for name in X_AXES:
        values = {row.settings.get(name) for row in rows}
        if len(values) > 1 and all(isinstance(value, int | float) for value in values):
            return name
    return None


def _curves(axes: Any, rows: list[Row], name: str, smooth: int) -> None:
    others = [other for other in varying(rows) if other not in (name, "start")]
    lines: dict[str, list[tuple[float, Cell]]] = {}
    for row in rows:
        for column, cell in row.cells.items():
            label = " ".join([column, *(str(row.settings.get(other, "")) for other in others)])
            lines.setdefault(label, []).append((row.settings[name], cell))
    for label, line_points in lines.items():
        points = sorted(line_points, key=lambda point: point[0])
        x = [x for x, _ in points]
        (line,) = axes.plot(x, _smoothed([cell.value for _, cell in points], smooth), marker=".", label=label)
        if all(cell.low is not None for _, cell in points):
            low, high = ([getattr(cell, side) for _, cell in points] for side in ("low", "high"))
            axes.fill_between(x, _smoothed(low, smooth), _smoothed(high, smooth), alpha=0.15, color=line.get_color())
    values = [cell.value for row in rows for cell in row.cells.values()]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    if min(row.settings[name] for row in rows) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xlabel({"stop": "position, tokens", "length": "length, tokens"}.get(name, name))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _smoothed(values: list[float], width: int) -> list[float]:
    padded = numpy.pad(numpy.array(values, dtype=float), (width // 2, (width - 1) // 2), mode="edge")
    return list(numpy.convolve(padded, numpy.ones(width) / width, mode="valid"))


def _heatmap(figure: Any, axes: Any, rows: list[Row], column: str) -> None:
    lengths, depths = (sorted({row.settings[name] for row in rows}) for name in ("length", "depth"))
    grid = numpy.full((len(depths), len(lengths)), numpy.nan)
    for row in rows:
        if column in row.cells:
            place = depths.index(row.settings["depth"]), lengths.index(row.settings["length"])
            grid[place] = row.cells[column].value
    image = axes.imshow(grid, vmin=0, vmax=max(1.0, numpy.nanmax(grid)), cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, fontsize=7)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth")
    figure.colorbar(image, ax=axes)


def _bars(axes: Any, rows: list[Row]) -> None:
    bars = [
        (" ".join([column, *map(str, row.settings.values())])[:40], cell)
        for row in rows
        for column, cell in row.cells.items()
    ]
    spread = [[0.0, 0.0] if c.low is None else [c.value - c.low, (c.high or c.value) - c.value] for _, c in bars]
    axes.barh([label for label, _ in bars], [cell.value for _, cell in bars], xerr=numpy.abs(spread).T)
    axes.tick_params(labelsize=7)
