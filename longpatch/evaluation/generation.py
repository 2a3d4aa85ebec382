"""Real text continued at chosen positions, compared with how it really goes on (LM-Infinite, arXiv 2308.16137, 4.3)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LongpatchError
from .arms import Arm
from .documents import Document
from .metrics import bleu, rouge, sentence_bleu
from .prompts import Answerer
from .run import Measurement, Sample, Work


def generation_samples(
    documents: Iterable[Document], tokenizer, positions: Sequence[int], new_tokens: int
) -> list[Sample]:
    """One sample for each document and position that leaves `new_tokens` tokens to compare with.

    Raises:
        LongpatchError: where there is none.
    """
    samples = []
    for document in documents:
        ids = document.ids(tokenizer, max(positions) + new_tokens)
        identity = document.identity
        for position in positions:
            if position + new_tokens <= len(ids):
                content = ids[:position], ids[position : position + new_tokens]
                samples.append(Sample({"length": position}, identity, content, position))
    if not samples:
        reason = f"no text has {min(positions) + new_tokens} tokens"
        raise LongpatchError("eval generation", [reason], "texts of position and --new-tokens together")
    return samples


@dataclass
class Generation:
    """The evaluation: ROUGE of each continuation, BLEU of each and, by `corpus_bleu`, of all at a position."""

    answerer: Answerer

    def measure(self, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
        ids, true = sample.content
        answer = self.answerer.answer(arm, ids)
        reference = self.answerer.tokenizer.decode(true, skip_special_tokens=True)
        detail = {"answer": answer, "reference": reference}
        measured = [Measurement("bleu_sentence", sentence_bleu(answer, reference), "%", detail=detail)]
        return measured + [Measurement(name, value) for name, value in rouge(answer, reference).items()]


def corpus_bleu(
    records: list[dict[str, Any]], group_record: Callable[..., dict[str, Any]], language: str = "en"
) -> list[dict[str, Any]]:
    """Records of the BLEU of all answers together, for each group of "bleu_sentence" records."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["metric"] == "bleu_sentence":
            groups.setdefault(repr(record["settings"]), []).append(record)
    corpus = []
    for group in groups.values():
        answers, references = ([record["detail"][name] for record in group] for name in ("answer", "reference"))
        value = bleu(answers, references, language)
        corpus.append(group_record("bleu", value, "%", len(group), group[0]["settings"]))
    return corpus
