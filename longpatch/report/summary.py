"""Records of samples pooled into means with confidence intervals, and runs compared."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy

RESAMPLES = 1000
LOG_METRICS = {"nll": "perplexity", "nll_document": "perplexity of all tokens"}
LOADING = ("dtype", "peft", "load_in_4bit", "rope_method", "rope_factor", "rope_theta")  # how a model was loaded
VARIANCE = "nll_variance"
MEAN_OF_DOCUMENTS = "nll_mean_over_documents"


@dataclass(frozen=True)
class Cell:
    """A mean and its 95 % interval (None for a single sample), over `samples` samples, `n` observations in all."""

    value: float
    low: float | None
    high: float | None
    samples: int
    n: int


@dataclass
class Row:
    """One metric under one setting: a cell for each column (an arm of a run)."""

    command: str
    metric: str
    unit: str
    settings: dict[str, Any]
    cells: dict[str, Cell]
    against: dict[str, Cell]  # difference to the first column, over the samples both have; a ratio for perplexity


def summarise(records: Iterable[dict[str, Any]], names: dict[int, str] | None = None) -> list[Row]:
    """Pool records into rows: means weighted by `n`, intervals by bootstrap over samples, paired differences.

    Mean NLL becomes perplexity; where records carry the variance of NLL over their tokens, so does a row of its own.
    `names` label the records of several files by id(record), where models and arms do not tell them apart.
    """
    records = list(records)
    loading = [name for name in LOADING if len({json.dumps(r["settings"].get(name)) for r in records}) > 1]
    column_of = _columns(records, names or {}, loading)
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record, column in zip(records, column_of, strict=True):
        settings = {name: value for name, value in record["settings"].items() if name not in ("arm", *loading)}
        key = json.dumps([record["command"], record["metric"], record["unit"], settings])
        groups.setdefault(key, {}).setdefault(column, []).append(record)
        if record["metric"] == "nll" and "variance" in record.get("detail", {}):
            key = json.dumps([record["command"], VARIANCE, "nat^2", settings])
            groups.setdefault(key, {}).setdefault(column, []).append(record)
        if record["metric"] == "nll_document":
            key = json.dumps([record["command"], MEAN_OF_DOCUMENTS, record["unit"], settings])
            groups.setdefault(key, {}).setdefault(column, []).append({**record, "n": 1})
    order = list(dict.fromkeys(column_of))
    rows = []
    for key, columns in groups.items():
        command, metric, unit, settings = json.loads(key)
        if metric == MEAN_OF_DOCUMENTS and all(len(found) == 1 for found in columns.values()):
            continue
        rows.append(_row(command, metric, unit, settings, {c: columns[c] for c in order if c in columns}))
    return rows


def _columns(records: list[dict[str, Any]], names: dict[int, str], loading: list[str]) -> list[str]:
    """For each record the shortest label that tells its arm from others: arm, model and arm, or file and those.

    An arm has the settings of `loading` in its name: runs that differ in them are compared.
    """

    def arm_of(model: str, settings: dict[str, Any]) -> str:
        loaded = [f"{name}={settings[name]}" for name in loading if settings.get(name)]
        return " ".join([str(settings.get("arm", model)), *loaded])

    full = [
        (names.get(id(record), ""), record["model"], arm_of(record["model"], record["settings"])) for record in records
    ]
    models = {model for _, model, _ in full}
    places: dict[tuple[str, str], set[str]] = {}
    for file, model, arm in full:
        places.setdefault((model, arm), set()).add(file)

    def label(file: str, model: str, arm: str) -> str:
        named = f"{model} {arm}" if len(models) > 1 and arm != model else arm
        return f"{file}: {named}" if len(places[model, arm]) > 1 else named

    return [label(*parts) for parts in full]


def _row(command: str, metric: str, unit: str, settings: dict[str, Any], columns: dict[str, list[dict]]) -> Row:
    if metric == VARIANCE:
        return Row(command, metric, unit, settings, {column: _variance(rs) for column, rs in columns.items()}, {})
    is_log = metric.startswith("nll")
    name = LOG_METRICS.get(metric, "perplexity, geometric mean of documents" if is_log else metric)
    cells = {}
    for column, found in columns.items():
        cells[column] = _cell([r["value"] for r in found], [r["n"] for r in found], is_log, unit == "1" and not is_log)
    first, *others = columns
    known = _by_sample(columns[first])
    against = {}
    for column in others:
        found = _by_sample(columns[column])
        shared = [name for name in found if len(found[name]) == len(known.get(name, ()))]
        pairs = [pair for name in shared for pair in zip(found[name], known[name], strict=True)]
        if len(pairs) > 1:
            differences = [record["value"] - base["value"] for record, base in pairs]
            against[column] = _cell(differences, [record["n"] for record, _ in pairs], is_log, is_share=False)
    return Row(command, name, "1" if is_log else unit, settings, cells, against)


def _variance(records: list[dict[str, Any]]) -> Cell:
    """The variance over all tokens, from the mean, variance and number of each record's."""
    n, mean, variance = numpy.array([[r["n"], r["value"], r["detail"]["variance"]] for r in records]).T
    whole = (n * mean).sum() / n.sum()
    return Cell(float((n * (variance + (mean - whole) ** 2)).sum() / n.sum()), None, None, len(records), int(n.sum()))


def _by_sample(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by what tells their samples apart; several of which it is the same are in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(json.dumps(record.get("sample"), sort_keys=True), []).append(record)
    return found


def _wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` (Wilson, 1927): resampling has none to offer where all agree."""
    z = 1.96
    middle, spread = share + z * z / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _cell(values: list[float], weights: list[int], is_log: bool, is_share: bool) -> Cell:
    """`is_share`: values of 0 and 1 alone are a share. Where other values all agree there is no interval to give."""
    value, weight = numpy.array(values, dtype=float), numpy.array(weights, dtype=float)
    shown = numpy.exp if is_log else (lambda number: number)
    mean = float(shown((value * weight).sum() / weight.sum()))
    low = high = None
    if len(value) > 1 and is_share and set(values) <= {0, 1}:
        low, high = _wilson(mean, len(value))
    elif len(set(values)) > 1:
        drawn = numpy.random.default_rng(0).integers(len(value), size=(RESAMPLES, len(value)))
        means = (value * weight)[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
        low, high = (float(shown(bound)) for bound in numpy.quantile(means, (0.025, 0.975)))
    return Cell(mean, low, high, len(values), int(weight.sum()))
