"""Saved answers scored anew, without a model."""

import json
from collections.abc import Callable
from typing import Any

from ..errors import LongpatchError
from .arms import Arm
from .run import Measurement, Run, Sample, digest

ARM = Arm("saved answers", answer="")


def rescore(
    run: Run,
    records: list[dict[str, Any]],
    score: Callable[[dict[str, Any]], list[Measurement]],
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """For the first `limit` answers in `records` those of `score(detail)`; all else is as it was recorded.

    Raises:
        LongpatchError: if there are no answers.
    """
    answers: dict[str, dict[str, Any]] = {}
    for record in records:
        if "answer" in record.get("detail", {}):
            answers.setdefault(json.dumps([record["model"], record["settings"], record["sample"]]), record)
    if not answers:
        raise LongpatchError("--rescore", ["no record holds an answer"])
    samples = [
        Sample({}, {"number": number, "digest": digest(record["detail"])}, record)
        for number, record in enumerate(list(answers.values())[:limit])
    ]
    again = run.records(None, [ARM], samples, lambda arm, sample, work: score(sample.content["detail"]))
    return [
        samples[line["sample"]["number"]].content
        | {name: line[name] for name in ("metric", "value", "unit", "n", "detail")}
        for line in again
    ]
