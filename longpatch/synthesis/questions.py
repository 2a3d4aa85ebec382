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
GAP = "\n\n[...]\n\n"
DECODER = json.JSONDecoder()
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


class Unreadable(LongpatchError):
    """A reply that is not as it was asked for."""


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

    @property
    def characters(self) -> int:
        """Of a row's text."""
        return self.length * CHARACTERS


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
            Unreadable: for a reply without questions and answers.
        """
        pairs = read_pairs(reply)
        messages = []
        for number, (question, answer) in enumerate(pairs):
            content = question if number else f"{self.text}\n\n{question}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "kind": self.kind, "job": self.name}


def make_jobs(texts: dict[str, str], asking: Asking) -> Iterator[Job]:
    """One job for each stretch of each text and kind, and one "life" for each text; the same for the same seed.

    Raises:
        LongpatchError: where "details" has too few texts to bring together.
    """
    stretches = {
        (place, start): text[start : start + asking.characters]
        for place, text in texts.items()
        for start in range(0, len(text), asking.characters)
        if start == 0 or len(text) - start > asking.characters // 2
    }
    if "details" in asking.kinds and len(stretches) < asking.texts:
        reason = f"{len(stretches)} texts, where 'details' brings {asking.texts} together"
        raise LongpatchError(CALL, [reason], "more texts, or fewer --texts")
    order = list(stretches)
    Random(asking.seed).shuffle(order)
    for (place, start), stretch in stretches.items():
        for kind in asking.kinds:
            name = f"{kind}:{place}:{start // asking.characters}"
            random = Random(f"{asking.seed} {name}")
            if kind == "detail":
                yield _job(name, kind, stretch, [stretch], 1, asking, random)
            elif kind == "details":
                chosen = [(place, start), *_others((place, start), order, asking.texts - 1)]
                parts = [stretches[other][: asking.characters // asking.texts] for other in chosen]
                whole = "\n\n".join(f"Text {i}\n\n{part}" for i, part in enumerate(parts, start=1))
                yield _job(name, kind, whole, parts, max(1, asking.segments // asking.texts), asking, random)
            elif start == 0:
                parts = _through(texts[place], asking)
                whole = GAP.join(parts)
                yield _job(name, kind, whole, parts, asking.segments // len(parts), asking, random)


def _job(name: str, kind: str, whole: str, parts: list[str], each: int, asking: Asking, random: Random) -> Job:
    """`each` excerpts of each of the parts are shown."""
    count = 1 if kind == "life" else asking.questions
    excerpts = [excerpt for part in parts for excerpt in _spread(part, each, asking, random)]
    shown = "\n\n".join(f"[Part {i}]\n{excerpt}" for i, excerpt in enumerate(excerpts, start=1))
    prompt = f"{PROMPTS[kind].format(count=count)}{REPLY.format(count=count)}\n\n{shown}"
    return Job(name, kind, whole, prompt, count)


def _others(first: tuple[str, int], order: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """The `count` stretches that follow `first` in `order`: each of another text, while there are such."""
    at, seen, new, old = order.index(first), {first[0]}, [], []
    for stretch in (*order[at + 1 :], *order[:at]):
        if len(new) == count:
            break
        (old if stretch[0] in seen else new).append(stretch)
        seen.add(stretch[0])
    return [*new, *old][:count]


def _through(text: str, asking: Asking) -> list[str]:
    """A text from its beginning to its end: whole, or evenly spread parts that are as long as a row together."""
    if len(text) <= asking.characters:
        return [text]
    size, gaps = asking.characters // asking.segments, max(1, asking.segments - 1)
    starts = [i * (len(text) - size) // gaps for i in range(asking.segments)]
    return [text[start : start + size] for start in starts]


def _spread(text: str, count: int, asking: Asking, random: Random) -> list[str]:
    """`count` excerpts, one from somewhere in each of as many equal stretches."""
    size, share = asking.segment * CHARACTERS, len(text) // count
    starts = (i * share + random.randrange(max(1, share - size)) for i in range(count))
    return [text[start : start + min(size, share)] for start in starts]


def read_pairs(reply: str) -> list[tuple[str, str]]:
    """Questions and answers of a reply: the first JSON list of them, which may stand in other text.

    Raises:
        Unreadable: where there is none.
    """
    for found in re.finditer(r"\[\s*\{", reply):
        try:
            value, _ = DECODER.raw_decode(reply, found.start())
            pairs = [(pair["question"].strip(), pair["answer"].strip()) for pair in value]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if pairs and all(question and answer for question, answer in pairs):
            return pairs
    raise Unreadable(CALL, [f"the reply holds no questions and answers: {reply[:60]!r}"])
