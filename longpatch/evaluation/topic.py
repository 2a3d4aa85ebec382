"""LongEval (LMSYS, 2023): name the first topic of a long conversation, or a number that stood in one of many lines."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .arms import Arm
from .documents import check_row
from .metrics import contains, exact_number
from .prompts import Answerer
from .run import Measurement, Sample, Work, digest

TOPICS = (
    "the history of bridges", "keeping bees", "the art of mosaic", "sleep and dreams", "volcanoes", "learning chess",
    "the fall of Rome", "growing tomatoes", "the physics of sailing", "medieval music", "glass blowing", "tides",
    "the life of whales", "baking bread", "polar exploration", "the printing press", "opera", "desert animals",
    "repairing clocks", "the spice trade", "comets", "folk tales", "steam engines", "mountain climbing",
    "the theatre of shadows", "coral reefs", "writing letters", "the silk road", "wild mushrooms", "lighthouses",
)  # fmt: skip
TURNS = (
    ("What should I know first?", "It begins simply: watch closely, and write down what changes."),
    ("How did it come about?", "Slowly, in several places at once; most who had a share in it are forgotten."),
    ("Is it difficult?", "Not at first. What is difficult is to go on with it for years and still be surprised."),
    ("What do people get wrong?", "They hurry. Nearly every mistake made here comes from a wish to be done."),
    ("Where could I see it for myself?", "Nearer than you think; ask the oldest person you know."),
    ("What would you read about it?", "Something short and old, and then something long and new, and compare the two."),
)  # fmt: skip
FIRST = ("grey", "quick", "silent", "amber", "crooked", "early", "hollow", "narrow", "plain", "rusty", "tall", "young")
SECOND = ("anchor", "barrel", "candle", "drum", "feather", "garden", "harbor", "island", "kettle", "ladder", "mirror")

TOPIC_TASK = (
    "Below is a record of our previous conversation on {count} different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic name. Now the record start. "
)
TOPIC_QUESTION = (
    "Now the record ends. What is the first topic we discussed? Only give me the topic name. Do not summarize yourself."
)
LINE_TASK = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
    "a certain line index. Now the record start:\n\n"
)
LINE_QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {line}? I need the number."


def topic_samples(counts: Sequence[int], trials: int, turns: int, seed: int) -> list[Sample]:
    """Conversations over `counts` topics, `turns` exchanges each; asked for: the first."""
    rng = random.Random(seed)
    samples = []
    for count in counts:
        for trial in range(trials):
            topics = [topic if i < len(TOPICS) else f"{topic}, part {i // len(TOPICS) + 1}"
                      for i, topic in enumerate(_drawn(rng, TOPICS, count))]  # fmt: skip
            record = "".join(_conversation(rng, topic, turns) for topic in topics)
            prompt = TOPIC_TASK.format(count=count) + record + TOPIC_QUESTION
            samples.append(_sample("topic", count, trial, prompt, topics[0]))
    return samples


def line_samples(counts: Sequence[int], trials: int, seed: int) -> list[Sample]:
    """Records of `counts` lines, each with a number; asked for: that of a random line."""
    rng = random.Random(seed)
    samples = []
    for count in counts:
        for trial in range(trials):
            names = [f"{first}-{second}" for first in FIRST for second in SECOND]
            lines = [name if i < len(names) else f"{name}-{i}" for i, name in enumerate(_drawn(rng, names, count))]
            values = [rng.randint(1, 50_000) for _ in lines]
            asked = rng.randrange(count)
            rows = zip(lines, values, strict=True)
            record = "".join(f"line {line}: REGISTER_CONTENT is <{value}>\n" for line, value in rows)
            prompt = LINE_TASK + record + LINE_QUESTION.format(line=lines[asked])
            samples.append(_sample("line", count, trial, prompt, str(values[asked])))
    return samples


def row_samples(rows: Iterable[dict]) -> list[Sample]:
    """Samples of LongEval's own files: rows with "prompt" and either "topics" or "expected_number".

    Raises:
        LongpatchError: naming the row that lacks one.
    """
    samples = []
    for number, row in enumerate(rows):
        wanted: dict[str, Any] = {"topics": list} if "topics" in row else {"expected_number": (int, str)}
        check_row("eval topic", number, row, prompt=str, **wanted)
        if "topics" in row:
            samples.append(_sample("topic", len(row["topics"]), number, row["prompt"], row["topics"][0]))
        else:
            count = row["prompt"].count("REGISTER_CONTENT is")
            samples.append(_sample("line", count, number, row["prompt"], str(row["expected_number"])))
    return samples


@dataclass
class Topic:
    """The evaluation: "correct" is whether the topic is named, or the first number of the answer is the line's."""

    answerer: Answerer

    def measure(self, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
        prompt, target = sample.content
        start = "" if self.answerer.template.after else "\nANSWER:"
        answer = self.answerer.answer(arm, self.answerer.wrap(self.answerer.encode(prompt), start))
        score = contains if sample.settings["task"] == "topic" else exact_number
        return [Measurement("correct", score(answer, target), detail={"answer": answer})]


def _sample(task: str, count: int, trial: int, prompt: str, target: str) -> Sample:
    settings = {"task": task, "length": count}
    identity = {"trial": trial, "target": target, "digest": digest(prompt)}
    return Sample(settings, identity, (prompt, target), max(1, len(prompt)))


def _drawn(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    """`count` of `names` without repetition; all of them over again where there are too few."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(names, len(names))
    return drawn[:count]


def _conversation(rng: random.Random, topic: str, turns: int) -> str:
    opening = f"USER: I would like to discuss the topic of {topic}. ASSISTANT: Gladly! What about it interests you? "
    return opening + "".join(f"USER: {q} ASSISTANT: {a} " for q, a in rng.choices(TURNS, k=turns))
