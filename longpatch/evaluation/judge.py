"""A language model behind an OpenAI-compatible endpoint that marks answers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import LongpatchError

PROMPT = """\
Question: {question}
Reference answer: {target}
Answer to mark: {answer}

How well does the answer agree with the reference? Reply with one whole number from 1 (not at all) to 10 (fully)."""

NUMBER = r"(?<![\d.])(\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Judge:
    """Call it with question, target and answer for a mark of 0 to 1.

    It is the last "9/10" or "9 out of 10" of a reply, or else a number that it begins with, or else the last in it.

    Raises:
        LongpatchError: if the endpoint cannot be reached or the reply holds no such number.
    """

    endpoint: Callable[[str], str]

    def __call__(self, question: str, target: str, answer: str) -> float:
        text = self.endpoint(PROMPT.format(question=question.strip(), target=target, answer=answer))
        of_ten = re.findall(rf"{NUMBER}\s*(?:/|out of)\s*10\b", text)
        found = of_ten or re.findall(rf"^\W*{NUMBER}", text) or re.findall(NUMBER, text)
        marks = [float(mark) for mark in found if 1 <= float(mark) <= 10]
        if not marks:
            raise LongpatchError("judge", [f"the reply {text[:100]!r} holds no number from 1 to 10"])
        return (marks[-1] - 1) / 9
