"""A number hidden in text and asked for at the end (Mohtashami and Jaggi, arXiv 2305.16300)."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arms import Arm
from .metrics import exact_number, first_number, similarity
from .prompts import Answerer, bury, sentences
from .run import Measurement, Sample, Work

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
        "about the important information there. ",
        "The pass key is {key}. Remember it. {key} is the pass key. ",
        "What is the pass key?",
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
    lengths: Sequence[int], depths: Sequence[float], trials: int, digits: int, placement: str, seed: int
) -> list[Sample]:
    """Keys of `digits` digits: `trials` for each of `lengths` (tokens) and `depths`.

    `placement` "grid" takes the depths as they are; "random" and "first-half" draw one for every trial instead.
    """
    rng = random.Random(seed)
    samples = []
    for length in lengths:
        for depth in depths if placement == "grid" else [None]:
            for trial in range(trials):
                key = "".join([rng.choice("123456789"), *rng.choices("0123456789", k=digits - 1)])
                drawn = rng.random() / (2 if placement == "first-half" else 1)
                offset = rng.random()
                settings = {"length": length} if depth is None else {"length": length, "depth": depth}
                identity = {"trial": trial, "key": key}
                content = {"key": key, "depth": drawn if depth is None else depth, "offset": offset}
                samples.append(Sample(settings, identity, content, length))
    return samples


def row_samples(rows: Iterable[dict]) -> list[Sample]:
    """Samples of rows with "input" and "target", as LM-Infinite's data has them; "length" and "depth" where given."""
    samples = []
    for number, row in enumerate(rows):
        settings = {name: row[name] for name in ("length", "depth") if name in row}
        content = {"key": str(row["target"]), "text": row["input"]}
        samples.append(Sample(settings, {"row": number, "key": str(row["target"])}, content, max(1, len(row["input"]))))
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

    def prompt(self, sample: Sample) -> tuple[Tensor, float | None]:
        """Token ids [length], the answer's start included, and the depth of the key in the filler."""
        content, encode = sample.content, self.answerer.encode
        start = self.wording.answer_start
        if "text" in content:
            text = content["text"] + " " + self.wording.question
            return self.answerer.wrap(encode(text), start), None
        task, question = encode(self.wording.task), encode(self.wording.question)
        room = sample.settings["length"] - self.answerer.fixed_tokens(start) - len(task) - len(question)
        first = int(content["offset"] * len(self.filler))
        units = [*self.filler[first:], *self.filler[:first]]
        needle = encode(self.wording.line.format(key=content["key"]))
        text, depth = bury(units, needle, content["depth"], room)
        return self.answerer.wrap(torch.cat((task, text, question)), start), depth

    def measure(self, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
        ids, depth = self.prompt(sample)
        answer = self.answerer.answer(arm, ids)
        key = sample.content["key"]
        detail = {"answer": answer, "placed": depth}
        return [
            Measurement("exact", exact_number(answer, key), detail=detail),
            Measurement("fuzzy", similarity(first_number(answer), key)),
        ]


def passkey_prompt(tokenizer, filler: Tensor, length: int, depth: float, key: str) -> Tensor:
    """Token ids [length]: BOS, `filler` ids with the passkey line at `depth` (0 = start, 1 = end), and the question."""

    def encode(text):
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    bos = torch.tensor([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=torch.long)
    line, question = encode(passkey_line(key)), encode(ANSWER_PREFIX)
    room = length - len(bos) - len(line) - len(question)
    if room < 0 or room > len(filler):
        raise ValueError(f"length {length} needs a filler of {room} tokens, got {len(filler)}")
    place = round(depth * room)
    return torch.cat((bos, filler[:place], line, filler[place:room], question))


def passkey_accuracy(model, tokenizer, filler: Tensor, length: int, trials: int, seed: int = 0) -> float:
    """Share of `trials` prompts of `length` tokens whose key the model continues with, greedily; depths spread evenly.

    `filler` [n] are token ids of plain text; each trial takes another stretch of them.
    """
    rng = random.Random(seed)
    found = 0
    for trial in range(trials):
        key = f"{rng.randrange(10_000, 100_000)}"
        start = rng.randrange(max(1, len(filler) - length))
        prompt = passkey_prompt(tokenizer, filler[start : start + length], length, trial / max(1, trials - 1), key)
        answer = tokenizer.encode(f" {key}", add_special_tokens=False)
        output = model.generate(
            prompt[None].to(model.device),
            attention_mask=torch.ones_like(prompt)[None].to(model.device),
            max_new_tokens=len(answer),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        found += key in tokenizer.decode(output[0, length:])
    return found / trials
