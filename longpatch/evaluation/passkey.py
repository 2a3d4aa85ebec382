"""A number hidden in text and asked for at the end (Mohtashami and Jaggi, arXiv 2305.16300)."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arms import Arm
from .documents import check_row
from .metrics import exact_number, first_number, similarity
from .prompts import Answerer, bury, sentences
from .run import Measurement, Sample, Work, digest

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Wording:
    """What is said around the filler; {key} stands for the number."""

    task: str
    line: str
    question: str
    answer_start: str = ""


WORDINGS = {
    "plain": Wording(
        "",
        "\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        "\nWhat is the pass key?",
        " The pass key is",
    ),
    "lm-infinite": Wording(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information there.",
        " The pass key is {key}. Remember it. {key} is the pass key.",
        " What is the pass key?",
        " The pass key is",
    ),
    "80k": Wording(
        "There is an important infomation hidden in the following context. Find the information and memorize it. "
        "I will quiz you about the information there.\n",
        "\n\nThe passkey is {key}. Remember it. {key} is the passkey.\n\n",
        "\n\nWhat is the passkey?",
    ),
}
ANSWER_PREFIX = WORDINGS["plain"].question + WORDINGS["plain"].answer_start


def passkey_line(key: str) -> str:
    return WORDINGS["plain"].line.format(key=key)


def passkey_samples(
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    digits: int,
    placement: str,
    seed: int,
    text: str | None = None,
) -> list[Sample]:
    """Keys of `digits` digits: `trials` for each of `lengths` (tokens) and `depths`.

    `placement` "grid" takes the depths as they are; "random" and "first-half" draw one for every trial instead. `text`
    is the filler, by which these samples differ from those of other runs.
    """
    rng, filler = random.Random(seed), digest(text)
    samples = []
    for length in lengths:
        for depth in depths if placement == "grid" else [None]:
            for trial in range(trials):
                key = "".join([rng.choice("123456789"), *rng.choices("0123456789", k=digits - 1)])
                drawn = rng.random() / (2 if placement == "first-half" else 1)
                offset = rng.random()
                settings = {"length": length} if depth is None else {"length": length, "depth": depth}
                content = {"key": key, "depth": drawn if depth is None else depth, "offset": offset}
                identity = {"trial": trial, "key": key, "digest": digest(filler, content)}
                samples.append(Sample(settings, identity, content, length))
    return samples


def row_samples(rows: Iterable[dict]) -> list[Sample]:
    """Samples of rows with "input" and "target", as LM-Infinite's data has them; "length" and "depth" where given.

    Raises:
        LongpatchError: naming the row that lacks one.
    """
    samples = []
    for number, row in enumerate(rows):
        check_row("eval passkey", number, row, input=str, target=(str, int))
        settings = {name: row[name] for name in ("length", "depth") if name in row}
        content = {"key": str(row["target"]), "text": row["input"]}
        identity = {"row": number, "key": content["key"], "digest": digest(content)}
        samples.append(Sample(settings, identity, content, max(1, len(row["input"]))))
    return samples


@dataclass
class PassKey:
    """The evaluation: `filler` is what the number is hidden in, sentences of token ids."""

    answerer: Answerer
    wording: Wording
    filler: Sequence[Tensor]

    @classmethod
    def create(cls, answerer: Answerer, wording: Wording, text: str | None) -> "PassKey":
        return cls(answerer, wording, sentences(answerer.tokenizer, text or GRASS))

    def buried(self, sample: Sample) -> tuple[Tensor, float]:
        """Token ids of what stands before the question, and the depth of the key in the filler."""
        content, encode = sample.content, self.answerer.encode
        task, question = encode(self.wording.task), encode(self.wording.question)
        fixed = self.answerer.fixed_tokens(self.wording.answer_start)
        room = sample.settings["length"] - fixed - len(task) - len(question)
        first = int(content["offset"] * len(self.filler))
        units = [*self.filler[first:], *self.filler[:first]]
        needle = encode(self.wording.line.format(key=content["key"]))
        text, depth = bury(units, needle, content["depth"], room)
        return torch.cat((task, text)), depth

    def row(self, sample: Sample) -> dict[str, Any]:
        """The row of which `row_samples` makes the same prompt again."""
        content = sample.content
        text = content["text"] if "text" in content else self.answerer.tokenizer.decode(self.buried(sample)[0])
        return {"input": text, "target": content["key"]} | sample.settings

    def prompt(self, sample: Sample) -> tuple[Tensor, float | None]:
        """Token ids [length], the answer's start included, and the depth of the key in the filler."""
        encode, start, question = self.answerer.encode, self.wording.answer_start, self.wording.question
        if "text" in sample.content:
            return self.answerer.wrap(encode(sample.content["text"] + question), start), None
        ids, depth = self.buried(sample)
        return self.answerer.wrap(torch.cat((ids, encode(question))), start), depth

    def measure(self, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
        ids, depth = self.prompt(sample)
        answer = self.answerer.answer(arm, ids)
        key = sample.content["key"]
        detail = {"answer": answer, "placed": depth}
        return [
            Measurement("exact", exact_number(answer, key), detail=detail),
            Measurement("fuzzy", similarity(first_number(answer), key)),
        ]
