"""Summaries as Markdown."""

import itertools
from typing import Any

from .summary import Cell, Row


def tables(rows: list[Row], intervals: bool = True, counts: bool = False) -> str:
    """A Markdown table for each metric: a line for each setting, a column for each arm; then what arms differ by.

    `counts`: each cell says over how many observations it is a mean.
    """
    parts = []
    for (command, metric), group in itertools.groupby(
        sorted(rows, key=lambda row: (row.command, row.metric)), key=lambda row: (row.command, row.metric)
    ):
        found = list(group)
        parts.append(f"**{command}: {metric}**{_common(found)}\n\n{_table(found, 'cells', intervals, counts)}")
        if any(row.against for row in found):
            first = next(iter(found[0].cells))
            kind = "ratio" if metric.startswith("perplexity") else "difference"
            parts.append(f"{kind} to {first}, same samples\n\n{_table(found, 'against', intervals, counts)}")
    return "\n\n".join(parts)


def _table(rows: list[Row], which: str, intervals: bool, counts: bool) -> str:
    changing = varying(rows)
    columns = list(dict.fromkeys(column for row in rows for column in getattr(row, which)))
    lines = [[*changing, *columns], ["---"] * (len(changing) + len(columns))]
    for row in sorted(rows, key=lambda row: [_sortable(row.settings.get(name)) for name in changing]):
        cells = [_cell(getattr(row, which).get(column), intervals, counts) for column in columns]
        lines.append([_setting(row.settings.get(name)) for name in changing] + cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def varying(rows: list[Row]) -> list[str]:
    """Settings that are not the same in all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row.settings))
    return [name for name in names if len({str(row.settings.get(name)) for row in rows}) > 1]


def _common(rows: list[Row]) -> str:
    changing = varying(rows)
    common = {name: value for name, value in rows[0].settings.items() if name not in changing and value is not None}
    samples = sorted({cell.samples for row in rows for cell in row.cells.values()})
    counted = f"{samples[0]} to {samples[-1]}" if len(samples) > 1 else str(samples[0])
    said = [f"{name} {_setting(value)}" for name, value in common.items()]
    return " (" + ", ".join([*said, f"samples {counted}"]) + ")"


def _cell(cell: Cell | None, intervals: bool, counts: bool) -> str:
    if cell is None:
        return ""
    text = number(cell.value)
    if intervals and cell.low is not None:
        text += f" [{number(cell.low)}, {number(cell.high)}]"
    return f"{text} (n {cell.n:,})" if counts else text


def number(value: float | None) -> str:
    """Four significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _setting(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else number(value) if isinstance(value, float) else str(value)


def _sortable(value: Any) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))
