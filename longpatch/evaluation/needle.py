"""A sentence hidden in real text, and a question about it (Kamradt's needle test, in the 80K recipe's wording)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arms import Arm
from .metrics import best, contains, rouge, similarity
from .prompts import Answerer, bury, sentences
from .run import Measurement, Sample, Work, digest

TASK = (
    "There is an important infomation hidden in the following context. Find the information and memorize it. I will "
    "quiz you about the important information there.\n"
)
NEEDLE = "\n\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n\n"
QUESTION = "\n\nWhat is the best thing to do in San Francisco?"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"
METRICS = ("rouge", "match")
Judge = Callable[[str, str, str], float]


def needle_samples(
    lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int, texts: Sequence[str] = ()
) -> list[Sample]:
    """`trials` for each of `lengths` (tokens) and `depths`, each beginning elsewhere in the haystack.

    `texts`: haystack, needle, question, by which these samples differ from those of other runs.
    """
    rng, made_of = random.Random(seed), digest(list(texts))
    samples = []
    for length in lengths:
        for depth in depths:
            for trial in range(trials):
                start = rng.random()
                identity = {"trial": trial, "digest": digest(made_of, start)}
                samples.append(Sample({"length": length, "depth": depth}, identity, start, length))
    return samples


def scores(answer: str, target: str, metrics: Sequence[str]) -> dict[str, float]:
    """ "rouge": ROUGE-L's F; "match": whether the target stands in the answer; "similar": how far the strings agree."""
    found = {}
    if "rouge" in metrics:
        found["rougeL"] = rouge(answer, target)["rougeL"]
    if "match" in metrics:
        found["match"] = contains(answer, target)
        found["similar"] = best(similarity, answer, [target])
    return found


@dataclass
class Needle:
    """The evaluation; `judge` gives a mark of 0 to 1 for an answer, where one is asked."""

    answerer: Answerer
    haystack: Sequence[Tensor]
    needle: str = NEEDLE
    question: str = QUESTION
    target: str = ANSWER
    metrics: Sequence[str] = METRICS
    judge: Judge | None = None

    @classmethod
    def create(cls, answerer: Answerer, text: str, **options) -> "Needle":
        return cls(answerer, sentences(answerer.tokenizer, text), **options)

    def prompt(self, sample: Sample) -> tuple[Tensor, float]:
        """Token ids [length] and the depth at which the needle came to lie."""
        encode = self.answerer.encode
        start = "" if self.answerer.template.after else "\nAnswer:"
        task, question = encode(TASK), encode(self.question)
        room = sample.settings["length"] - self.answerer.fixed_tokens(start) - len(task) - len(question)
        first = int(sample.content * len(self.haystack))
        units = [*self.haystack[first:], *self.haystack[:first]]
        text, depth = bury(units, encode(self.needle), sample.settings["depth"], room)
        return self.answerer.wrap(torch.cat((task, text, question)), start), depth

    def measure(self, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
        ids, depth = self.prompt(sample)
        answer = self.answerer.answer(arm, ids)
        said = {"answer": answer, "placed": depth, "question": self.question, "target": self.target}
        return mark(said, self.metrics, self.judge)


def mark(said: dict[str, Any], metrics: Sequence[str], judge: Judge | None) -> list[Measurement]:
    """Scores of what was `said`: {"answer", "question", "target", ...}, which they keep."""
    marks = scores(said["answer"], said["target"], metrics)
    if judge is not None:
        marks["judge"] = judge(said["question"], said["target"], said["answer"])
    return [Measurement(name, value, detail=said) for name, value in marks.items()]
