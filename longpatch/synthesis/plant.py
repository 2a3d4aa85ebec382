"""Rows of questions about real text, made without any model: sentences planted at chosen distances."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ..data.documents import Encoder
from ..data.sources import Source
from ..errors import LongpatchError, at_least
from .files import CALL
from .puzzles import KINDS, Puzzle, Supply

SENTENCE = re.compile(r"(?<=[.!?])\s+")
CHARACTERS = 8  # more than a token has in most texts
LEAST_DISTANCE = 32


@dataclass(frozen=True)
class Planting:
    """What rows are like.

    Attributes:
        length: tokens of a row at most, its questions, answers and template included.
        kinds: names of `KINDS`.
        questions: of a row, one after another about the same text.
        distances: tokens from the farthest sentence that a question needs to the text's end, drawn for each
            question; empty: 32, 64, 128, ... and the whole text.
        seed: of everything that is drawn.
    """

    length: int
    kinds: tuple[str, ...] = tuple(KINDS)
    questions: int = 1
    distances: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        reasons = at_least(64, length=self.length) + at_least(1, questions=self.questions)
        reasons += [f"kind {kind!r} is unknown" for kind in self.kinds if kind not in KINDS]
        if not self.kinds:
            reasons.append("no kind is given")
        if not reasons:
            reasons += [f"distance {d} is not within the length" for d in self.distances if not 0 < d < self.length]
        if reasons:
            raise LongpatchError(CALL, reasons, f"kinds {', '.join(KINDS)}")


def planted_rows(texts: Sequence[str], encoder: Encoder, planting: Planting) -> Iterator[dict[str, Any]]:
    """Rows `{messages, kinds, distances}` without end; `distances` are those reached, in tokens.

    Raises:
        LongpatchError: where the texts are too short, or the questions leave no room for text.
    """
    number = 0
    while True:
        yield _row(texts, encoder, planting, Random(f"{planting.seed} {number}"))
        number += 1


def _row(texts: Sequence[str], encoder: Encoder, planting: Planting, random: Random) -> dict[str, Any]:
    supply = Supply(random)
    puzzles: list[Puzzle] = []
    while len(puzzles) < planting.questions:
        kinds = [kind for kind in planting.kinds if supply.has(kind)]
        if not kinds:
            raise LongpatchError(CALL, [f"{planting.questions} questions a row are too many of these kinds"])
        puzzles.append(KINDS[random.choice(kinds)](supply))
    lines = " ".join(line for puzzle in puzzles for line in puzzle.sentences)
    room = planting.length - _size(encoder, _messages(lines, puzzles))
    if room < LEAST_DISTANCE:
        reason = f"{planting.questions} questions leave {room} of {planting.length} tokens for the text"
        raise LongpatchError(CALL, [reason], "a greater length, or fewer questions")
    units = _sentences(texts, encoder, room, random)
    total = sum(size for _, size in units) + len(encoder.tokens.inner(lines))
    distances = planting.distances or _doubling(total)
    wanted = []
    for number, puzzle in enumerate(puzzles):
        farthest = min(random.choice(distances), total)
        places = [farthest, *(random.randrange(farthest) for _ in puzzle.sentences[1:])]
        random.shuffle(places)
        wanted += [(place, number, line) for place, line in zip(places, puzzle.sentences, strict=True)]
    text, reached = _plant(units, wanted, encoder, len(puzzles))
    while _size(encoder, _messages(text, puzzles)) > planting.length:  # tokens at the joints
        text = text.partition(" ")[2]
    kinds = [puzzle.kind for puzzle in puzzles]
    return {"messages": _messages(text, puzzles), "kinds": kinds, "distances": reached}


def _messages(text: str, puzzles: list[Puzzle]) -> list[dict[str, str]]:
    messages = []
    for number, puzzle in enumerate(puzzles):
        question = puzzle.question if number else f"{text}\n\n{puzzle.question}"
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": puzzle.answer})
    return messages


def _size(encoder: Encoder, messages: list[dict[str, str]]) -> int:
    return len(encoder((0, Source(CALL, {"messages": messages}))).ids)


def _sentences(texts: Sequence[str], encoder: Encoder, room: int, random: Random) -> list[tuple[str, int]]:
    """Sentences from somewhere in `texts`, up to `room` tokens, each with its size."""
    long_enough = [text for text in texts if len(text) > room]
    for _ in range(16 if long_enough else 0):
        text = random.choice(long_enough)
        start = random.randrange(max(1, len(text) - CHARACTERS * room))
        units, size = [], 0
        for sentence in SENTENCE.split(text[start : start + CHARACTERS * room])[1:]:
            sentence = " ".join(sentence.split())
            tokens = len(encoder.tokens.inner(" " + sentence))
            if size + tokens > room:
                return units
            units.append((sentence, tokens))
            size += tokens
    raise LongpatchError(CALL, [f"no text has {room} tokens to plant anything in"], "longer texts, or shorter rows")


def _plant(
    units: list[tuple[str, int]], wanted: list[tuple[int, int, str]], encoder: Encoder, count: int
) -> tuple[str, list[int]]:
    """The text, built from its end, and for each question the distance that its farthest sentence has."""
    backwards: list[str] = []
    behind, reached = 0, [0] * count
    waiting = sorted(wanted, reverse=True)
    for sentence, size in [*reversed(units), ("", 0)]:
        while waiting and (waiting[-1][0] <= behind + size // 2 or not sentence):
            _, number, line = waiting.pop()
            reached[number] = behind
            backwards.append(line)
            behind += len(encoder.tokens.inner(" " + line))
        if sentence:
            backwards.append(sentence)
            behind += size
    return " ".join(reversed(backwards)), reached


def _doubling(total: int) -> tuple[int, ...]:
    distances = []
    distance = LEAST_DISTANCE
    while distance < total:
        distances.append(distance)
        distance *= 2
    return (*distances, total)
