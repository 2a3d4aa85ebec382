"""Jobs are sent to an endpoint; each finished one is a row on disk, so that a run can be gone on with."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..endpoint import Endpoint, NoReply
from ..errors import LongpatchError
from ..pool import as_done
from .files import CALL
from .questions import CHARACTERS, Job, Unreadable

ANSWER_TOKENS = {"detail": 80, "details": 160, "life": 800}
ATTEMPTS = 3  # at a reply that can be read
BEGINNING = b'{"messages": [{"role": "user", "content": "'  # of each row


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
    """Names of the jobs whose rows are in the file, which is only read.

    Raises:
        LongpatchError: for a file that is something else.
    """
    if not path.exists():
        return set()
    whole, tail = _split(path)
    try:
        names = {json.loads(line)["job"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise LongpatchError(CALL, [f"{path} holds rows that are not from here"], "a new file") from error
    if not _is_begun(tail):
        raise LongpatchError(CALL, [f"{path} ends in what is no row from here"], "a new file")
    return names


def _split(path: Path) -> tuple[bytes, bytes]:
    """Whole lines, and what a killed run left of a last one."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _is_begun(tail: bytes) -> bool:
    """Whether `tail` can be the beginning of a row from here; nothing else may be cut off."""
    try:
        row = json.loads(tail)
    except ValueError:
        return tail[: len(BEGINNING)] == BEGINNING[: len(tail)]
    return isinstance(row, dict) and "job" in row


def send(jobs: Sequence[Job], endpoint: Endpoint, out: Path, parallel: int = 4) -> Iterator[str | None]:
    """Append the row of each job to `out` as soon as it is there; yields for each None, or why it has no row.

    What a killed run left of a last line of `out` is cut off first.

    Raises:
        LongpatchError: where the endpoint fails for good; rows of requests that were answered stay.
    """

    def ask(job: Job) -> dict[str, Any] | str:
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                reply = endpoint(job.prompt, temperature=0.0 if attempt == 0 else 0.7)
                return job.row(reply)
            except (NoReply, Unreadable) as error:
                reason = f"{job.name}: {error.reasons[0]}"
        return reason

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        whole, _ = _split(out)
        os.truncate(out, len(whole))
    with ThreadPoolExecutor(parallel) as pool, out.open("a", encoding="utf-8") as file:
        for row in as_done(pool, ask, jobs, parallel):
            if isinstance(row, str):
                yield row
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            yield None
