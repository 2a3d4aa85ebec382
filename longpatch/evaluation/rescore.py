"""Saved answers scored anew, without a model."""

import json
from collections.abc import Callable
from typing import Any

from ..errors import LongpatchError
from .run import Measurement


def rescore(records: list[dict[str, Any]], score: Callable[[str, Any], list[Measurement]]) -> list[dict[str, Any]]:
    """For every answer in `records` the records of `score(answer, placed)`; all else is as it was recorded.

    Raises:
        LongpatchError: if there are no answers.
    """
    answers: dict[str, dict[str, Any]] = {}
    for record in records:
        if "answer" in record.get("detail", {}):
            answers.setdefault(json.dumps([record["model"], record["settings"], record["sample"]]), record)
    if not answers:
        raise LongpatchError("--rescore", ["no record holds an answer"])
    again = []
    for record in answers.values():
        for measured in score(record["detail"]["answer"], record["detail"].get("placed")):
            values = {"metric": measured.metric, "value": measured.value, "unit": measured.unit, "n": measured.n}
            again.append({**record, **values, "detail": measured.detail})
    return again
