"""Records pooled into means and intervals, and paired with each other, against numbers computed otherwise."""

import math

import numpy
import pytest

from longpatch.report.summary import summarise
from longpatch.report.table import tables
from longpatch.results import record


def made(values, metric="exact", arm="a", n=None, model="m", **settings):
    """One record a sample."""
    return [
        record("eval test", model, metric, value, "1", 1 if n is None else n[number], arm=arm, **settings)
        | {"sample": {"trial": number}}
        for number, value in enumerate(values)
    ]


def test_shares_have_wilsons_interval():
    stats = pytest.importorskip("scipy.stats", reason="the numbers to compare with are scipy's")
    for hits in (0, 9, 10):
        (row,) = summarise(made([1.0] * hits + [0.0] * (10 - hits)))
        expected = stats.binomtest(hits, 10).proportion_ci(method="wilson")
        assert row.cells["a"].value == hits / 10
        assert (row.cells["a"].low, row.cells["a"].high) == pytest.approx(tuple(expected), abs=1e-3)


def test_means_have_bootstraps_interval():
    values = numpy.random.default_rng(0).normal(5, 1, 200)
    (row,) = summarise(made(values, metric="f1"))
    cell, error = row.cells["a"], 1.96 * values.std() / 200**0.5
    assert cell.value == pytest.approx(values.mean())
    assert (cell.low, cell.high) == pytest.approx((cell.value - error, cell.value + error), abs=0.15 * error)


def test_perplexity_is_weighted_by_tokens_and_over_documents():
    by_metric = {row.metric: row.cells["a"] for row in summarise(made([1.0, 3.0], "nll_document", n=[1, 3]))}
    assert by_metric["perplexity of all tokens"].value == pytest.approx(math.exp(2.5))
    assert by_metric["perplexity of all tokens"].n == 4
    assert by_metric["perplexity, geometric mean of documents"].value == pytest.approx(math.exp(2.0))


def test_arms_are_compared_on_the_samples_they_share():
    """Paired: what varies from sample to sample alike in both arms does not widen the interval."""
    values = numpy.linspace(0.1, 0.9, 9)
    lower = values + numpy.tile([-0.2, -0.1, -0.3], 3)
    (row,) = summarise(made(values, "f1") + made(lower[:8], "f1", arm="b"))
    found, alone = row.against["b"], row.cells["b"]
    assert found.samples == 8
    assert found.value == pytest.approx((lower - values)[:8].mean())
    assert -0.3 < found.low < found.high < -0.1
    assert alone.high - alone.low > 2 * (found.high - found.low)
    (nll,) = summarise(made([1.0, 2.0], "nll") + made([1.5, 2.6], "nll", arm="b"))
    assert nll.against["b"].value == pytest.approx(math.exp(0.55))


def test_samples_of_one_name_are_paired_in_order():
    """As in records of two files of one name; where there are not as many of them, no order says which is which."""

    def same(*values, metric="nll_document", arm="a"):
        return [r | {"sample": {"document": "t.txt"}} for r in made(values, metric, arm=arm)]

    pooled, mean = summarise(same(1.0, 3.0) + same(1.5, 4.0, arm="b"))
    assert mean.metric == "perplexity, geometric mean of documents"
    assert pooled.against["b"].value == pytest.approx(math.exp(0.75))
    assert (pooled.against["b"].low, pooled.against["b"].high) == pytest.approx((math.exp(0.5), math.exp(1.0)))
    (row,) = summarise(same(1.0, 3.0, metric="f1") + same(1.5, metric="f1", arm="b"))
    assert not row.against


def test_a_difference_is_no_share():
    (row,) = summarise(made([1.0, 1.0, 0.0]) + made([1.0, 1.0, 0.0], arm="b"))
    assert (row.against["b"].value, row.against["b"].low) == (0.0, None)
    assert row.cells["a"].low is not None
    entropy = [r | {"unit": "nat"} for r in made([0.0, 0.0], "entropy")]
    assert summarise(entropy)[0].cells["a"].low is None


def test_columns_say_what_tells_them_apart():
    records = made([1.0]) + made([1.0], model="other") + made([1.0], arm="b")
    assert list(summarise(records)[0].cells) == ["m a", "other a", "m b"]
    first, second = made([1.0]), made([0.0])
    names = {id(first[0]): "before", id(second[0]): "after"}
    assert list(summarise(first + second, names)[0].cells) == ["before: a", "after: a"]


def test_a_model_loaded_in_another_way_is_another_column():
    before, after = made([1.0, 0.5], "f1"), made([0.5, 0.0], "f1", dtype="bfloat16", peft="lora")
    (row,) = summarise(before + after)
    assert list(row.cells) == ["a", "a dtype=bfloat16 peft=lora"]
    assert row.against["a dtype=bfloat16 peft=lora"].value == -0.5
    (alone,) = summarise(after)
    assert (list(alone.cells), alone.settings) == (["a"], {"dtype": "bfloat16", "peft": "lora"})


def test_tables():
    records = made([1.0, 0.0], length=256) + made([1.0, 1.0], length=1024)
    text = tables(summarise(records), intervals=False, counts=True)
    assert text.splitlines()[0] == "**eval test: exact** (samples 2)"
    assert text.splitlines()[2:] == [
        "| length | a |",
        "| --- | --- |",
        "| 256 | 0.5 (n 2) |",
        "| 1,024 | 1 (n 2) |",
    ]
