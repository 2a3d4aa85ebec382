"""Jobs are sent to an endpoint; each finished one is a row on disk, so that a run can be gone on with."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..endpoint import Endpoint
from ..errors import LongpatchError
from ..pool import in_order
from .files import CALL
from .questions import CHARACTERS, Job

ANSWER_TOKENS = {"detail": 80, "details": 160, "life": 800}
ATTEMPTS = 3  # at a reply that can be read


@dataclass(frozen=True)
class Cost:
    """What jobs will take, about: tokens at 4 characters each."""

    requests: int
    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests, about {self.input_tokens:,} tokens to read "
            f"and {self.output_tokens:,} to write"
        )

    def price(self, input_price: float, output_price: float) -> float:
        """For prices of a million tokens."""
        return (self.input_tokens * input_price + self.output_tokens * output_price) / 1e6


def cost(jobs: Sequence[Job]) -> Cost:
    reading = sum(len(job.prompt) for job in jobs) // CHARACTERS
    return Cost(len(jobs), reading, sum(job.questions * ANSWER_TOKENS[job.kind] for job in jobs))


def finished(path: Path) -> set[str]:
    """Names of the jobs whose rows are in the file; what a killed run left of a last line is cut off.

    Raises:
        LongpatchError: for a file that is something else.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        names = {json.loads(line)["job"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise LongpatchError(CALL, [f"{path} holds rows that are not from here"], "a new file") from error
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return names


def send(jobs: Sequence[Job], endpoint: Endpoint, out: Path, parallel: int = 4) -> Iterator[str | None]:
    """Append the row of each job to `out`; yields, job by job, None or why it has no row.

    Raises:
        LongpatchError: where the endpoint fails for good; rows that are finished stay.
    """

    def ask(job: Job) -> dict[str, Any] | str:
        reason = ""
        for attempt in range(ATTEMPTS):
            reply = endpoint(job.prompt, temperature=0.0 if attempt == 0 else 0.7)
            try:
                return job.row(reply)
            except LongpatchError as error:
                reason = f"{job.name}: {error.reasons[0]}"
        return reason

    with ThreadPoolExecutor(parallel) as pool, out.open("a", encoding="utf-8") as file:
        for row in in_order(pool, ask, jobs, 2 * parallel):
            if isinstance(row, str):
                yield row
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            yield None
