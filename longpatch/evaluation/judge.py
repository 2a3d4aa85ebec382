"""A language model behind an OpenAI-compatible endpoint that marks answers."""

import re
from dataclasses import dataclass

from ..endpoint import Endpoint
from ..errors import LongpatchError

PROMPT = """\
Question: {question}
Reference answer: {target}
Answer to mark: {answer}

How well does the answer agree with the reference? Reply with one whole number from 1 (not at all) to 10 (fully)."""


@dataclass(frozen=True)
class Judge:
    """Call it with question, target and answer for a mark of 0 to 1.

    Raises:
        LongpatchError: if the endpoint cannot be reached or replies without a number.
    """

    endpoint: Endpoint

    def __call__(self, question: str, target: str, answer: str) -> float:
        text = self.endpoint(PROMPT.format(question=question.strip(), target=target, answer=answer))
        found = re.search(r"\b(10|[1-9])\b", text)
        if not found:
            raise LongpatchError("judge", [f"the reply {text[:100]!r} holds no number from 1 to 10"])
        return (int(found[1]) - 1) / 9
