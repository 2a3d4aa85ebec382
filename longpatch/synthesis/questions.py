"""What a language model is asked about a long text, as the 80K recipe does (arXiv 2404.19553, sec. 2).

It sees excerpts only; the rows made of its replies hold the whole text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from ..errors import LongpatchError, at_least
from .files import CALL

CHARACTERS = 4  # of a token, about
REPLY = (
    'Reply with JSON alone: a list of {count} objects {{"question": ..., "answer": ...}}. A reader who has the whole '
    "text, but not these excerpts, must be able to answer; do not mention excerpts. Answer from the text alone."
)
PROMPTS = {
    "detail": "Below is a part of a longer text. Write {count} questions, each about one detail of it.\n",
    "details": "Below are parts of several texts. Write {count} questions, each of which can only be answered by "
    "bringing together details from at least two of the parts; name the texts or people meant.\n",
    "life": "Below are parts of one book, from its beginning to its end. Choose its main person. Write {count} "
    "question that asks for the whole course of that person's life in the book, and answer it at length, in order.\n",
}


@dataclass(frozen=True)
class Asking:
    """What is asked for.

    Attributes:
        kinds: "detail" (one detail in one text), "details" (many over several), "life" (a person's, through a book).
        length: tokens of a row's text at most, at about 4 characters a token.
        segment: tokens of an excerpt.
        segments: excerpts of one request, except for "detail", which has one.
        questions: of one request; "life" has one.
        texts: that a row of "details" brings together.
        seed: of what is chosen.
    """

    kinds: tuple[str, ...] = tuple(PROMPTS)
    length: int = 64_000
    segment: int = 2_000
    segments: int = 4
    questions: int = 4
    texts: int = 2
    seed: int = 0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("segment", "segments", "questions", "texts")}
        reasons = at_least(1, **sizes) + at_least(16, length=self.length)
        reasons += [f"kind {kind!r} is unknown" for kind in self.kinds if kind not in PROMPTS]
        if not reasons and self.segment * self.segments > self.length:
            reasons.append(f"{self.segments} segments of {self.segment} tokens are more than length={self.length}")
        if reasons:
            raise LongpatchError(CALL, reasons, f"kinds {', '.join(PROMPTS)}")


@dataclass(frozen=True)
class Job:
    """One request: `text` is what its row will hold, `prompt` what is asked."""

    name: str
    kind: str
    text: str
    prompt: str
    questions: int

    def row(self, reply: str) -> dict:
        """The row `{messages, kind, job}`: the text with the first question, then the others.

        Raises:
            LongpatchError: for a reply that is not as it was asked for.
        """
        pairs = read_pairs(reply)
        messages = []
        for number, (question, answer) in enumerate(pairs):
            content = question if number else f"{self.text}\n\n{question}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "kind": self.kind, "job": self.name}


def make_jobs(texts: dict[str, str], asking: Asking) -> Iterator[Job]:
    """One job for each stretch of each text and kind, the same for the same seed.

    Raises:
        LongpatchError: where "details" has too few texts to bring together.
    """
    size = asking.length * CHARACTERS
    stretches = {
        f"{place}:{start // size}": text[start : start + size]
        for place, text in texts.items()
        for start in range(0, len(text), size)
        if start == 0 or len(text) - start > size // 2
    }
    if "details" in asking.kinds and len(stretches) < asking.texts:
        reason = f"{len(stretches)} texts, where 'details' brings {asking.texts} together"
        raise LongpatchError(CALL, [reason], "more texts, or fewer --texts")
    names = list(stretches)
    for number, (name, text) in enumerate(stretches.items()):
        for kind in asking.kinds:
            random = Random(f"{asking.seed} {kind} {name}")
            if kind == "details":
                joined = [names[(number + i) % len(names)] for i in range(asking.texts)]
                share = size // asking.texts
                parts = [stretches[other][:share] for other in joined]
                whole = "\n\n".join(f"Text {i}\n\n{part}" for i, part in enumerate(parts, start=1))
                each = max(1, asking.segments // asking.texts)
                excerpts = [cut for part in parts for cut in _spread(part, each, asking, random)]
            else:
                whole = text
                excerpts = _spread(text, 1 if kind == "detail" else asking.segments, asking, random)
            count = 1 if kind == "life" else asking.questions
            shown = "\n\n".join(f"[Part {i}]\n{excerpt}" for i, excerpt in enumerate(excerpts, start=1))
            prompt = f"{PROMPTS[kind].format(count=count)}{REPLY.format(count=count)}\n\n{shown}"
            yield Job(f"{kind}:{name}", kind, whole, prompt, count)


def _spread(text: str, count: int, asking: Asking, random: Random) -> list[str]:
    """`count` excerpts, one from somewhere in each of as many equal stretches."""
    size, share = asking.segment * CHARACTERS, len(text) // count
    starts = (i * share + random.randrange(max(1, share - size)) for i in range(count))
    return [text[start : start + min(size, share)] for start in starts]


def read_pairs(reply: str) -> list[tuple[str, str]]:
    """Questions and answers of a reply, in JSON, which may stand in other text.

    Raises:
        LongpatchError: where there are none.
    """
    found = re.search(r"\[.*\]", reply, flags=re.DOTALL)
    try:
        pairs = [(pair["question"].strip(), pair["answer"].strip()) for pair in json.loads(found[0] if found else "")]
    except (ValueError, TypeError, KeyError, AttributeError):
        pairs = []
    if not pairs or not all(question and answer for question, answer in pairs):
        raise LongpatchError(CALL, [f"the reply holds no questions and answers: {reply[:60]!r}"])
    return pairs
