"""Questions about long texts: rows of context, question and answers (LM-Infinite's Qasper and NarrativeQA prompts)."""

from collections.abc import Iterable
from dataclasses import dataclass

from .arms import Arm
from .documents import check_row
from .metrics import best, normalised, token_f1
from .prompts import Answerer
from .run import Measurement, Sample, Work, digest

ARTICLE = (
    "You are given a scientific article and a question. Answer the question as concisely as you can, using a single "
    "phrase or sentence if possible. If the question cannot be answered based on the information in the article, write "
    '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Article:'
)
CONCISE = (
    "Please highlight your final answer with a single pair of <Answer> </Answer> tags. Do not provide any explanation."
)
SYSTEM = "You are a helpful, concise and honest assistant."
ANSWER_START = " <Answer>"
STOP = ("</Answer>",)
# LM-Infinite asks both data sets by the same words.
PROMPTS = {
    "qasper": f"{SYSTEM} {ARTICLE} {{context}} Question: {{question}} {CONCISE}",
    "narrativeqa": f"{SYSTEM} {ARTICLE} {{context}} Question: {{question}} {CONCISE}",
    "plain": "{context}\n\nQuestion: {question}\nAnswer:",
}
STARTS = {"qasper": ANSWER_START, "narrativeqa": ANSWER_START, "plain": ""}


def qa_samples(rows: Iterable[dict]) -> list[Sample]:
    """Samples of rows with "context", "question" and "answers" (a list, or one string).

    Raises:
        LongpatchError: naming the row that lacks one.
    """
    samples = []
    for number, row in enumerate(rows):
        check_row("eval qa", number, row, context=str, question=str, answers=(str, list))
        answers = [row["answers"]] if isinstance(row["answers"], str) else list(map(str, row["answers"]))
        content = {"context": row["context"], "question": row["question"], "answers": answers}
        identity = {"row": row.get("id", number), "digest": digest(content)}
        samples.append(Sample({}, identity, content, max(1, len(row["context"]))))
    return samples


def extract(answer: str) -> str:
    """What stands between <Answer> tags, or the first line where there are none."""
    if "<Answer>" in answer:
        answer = answer.partition("<Answer>")[2]
    answer = answer.partition("</Answer>")[0].strip()
    return answer.splitlines()[0].strip() if answer else ""


@dataclass
class QuestionAnswering:
    """The evaluation: F1 of words and exact match, each the maximum over the references.

    Attributes:
        prompt: a name in PROMPTS, or a text of one's own with {context} and {question}.
        context_tokens: contexts longer than this lose their middle, in every arm alike; None keeps them whole.
    """

    answerer: Answerer
    prompt: str = "qasper"
    context_tokens: int | None = None

    def measure(self, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
        content, tokenizer = sample.content, self.answerer.tokenizer
        context = content["context"]
        if self.context_tokens is not None:
            ids = tokenizer.encode(context, add_special_tokens=False)
            if len(ids) > self.context_tokens:
                first = self.context_tokens - self.context_tokens // 2
                kept = ids[:first], ids[len(ids) - self.context_tokens // 2 :]
                context = " ".join(tokenizer.decode(part) for part in kept)
        asked = PROMPTS.get(self.prompt, self.prompt).replace("{question}", content["question"])
        ids = self.answerer.encode(asked.replace("{context}", context))
        answer = extract(self.answerer.answer(arm, self.answerer.wrap(ids, STARTS.get(self.prompt, ""))))
        exact = max(float(normalised(answer) == normalised(reference)) for reference in content["answers"])
        return [
            Measurement("f1", best(token_f1, answer, content["answers"]), detail={"answer": answer}),
            Measurement("exact", exact),
        ]
