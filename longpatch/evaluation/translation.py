"""Documents translated segment by segment, each seeing the pairs before it (Temp-LoRA's GuoFeng task, 2401.11504)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import LongpatchError
from ..temp_lora import LearnOptions, Segment, temp_lora
from ..temp_lora.segments import guofeng_segments, recent
from .arms import Arm
from .documents import check_row
from .metrics import comet, sentence_bleu
from .prompts import Answerer, cut_middle
from .run import Measurement, Sample, Work, digest

TASK = "Translate the last line.\n\n"
PAIR = "{source_name}: {source}\n{target_name}:"


@dataclass(frozen=True)
class Translated:
    """What came of one segment: the prediction, and the mean NLL in nats of the `tokens` of its reference.

    A constant answer has no NLL.
    """

    output: str
    nll: float | None
    tokens: int


def segment_samples(documents: Iterable[dict], context: str = "k3") -> list[Sample]:
    """One sample a document: {"segments": [{"source", "target"}]}, or GuoFeng's {"contexts", "inference"}.

    All rows of GuoFeng are one document, a book in order. Of the contexts of its first row, pairs that come before the
    book, `context` is the one that is shown; those of later rows hold references of what is to be translated.
    """
    found: list[tuple[Any, list[Segment]]] = []
    book: list[Segment] = []
    for number, document in enumerate(documents):
        if document.get("segments"):
            check_row("eval translation", number, document, segments=list)
            for place, row in enumerate(document["segments"]):
                check_row(f"eval translation, row {number}, segments", place, row, source=str, target=str)
            segments = [Segment(row["source"], row["target"]) for row in document["segments"]]
            found.append((document.get("id", number), segments))
        elif document.get("inference"):
            check_row("eval translation", number, document, inference=list)
            for place, row in enumerate(document["inference"]):
                check_row(f"eval translation, row {number}, inference", place, row, zh=str, en=str)
            if not book:
                found.append((document.get("id", number), book))
            book += guofeng_segments(document, context, first=not book)
        else:
            raise LongpatchError("eval translation", [f"row {number} has no segments"], '"segments" or "inference"')
    samples = []
    for name, segments in found:
        identity = {"document": name, "digest": digest([[s.source, s.reference, s.before] for s in segments])}
        samples.append(Sample({}, identity, segments, max(1, sum(len(segment.source) for segment in segments))))
    return samples


@dataclass
class Translator:
    """Each segment of a document by one `generate`, its prompt holding the last pairs.

    Attributes:
        pairs: how many of them; None = as many as come before the document, 3 where none do.
        names: what the two languages are called in the prompt.
        own: the pairs' translations are the model's own, not the references (which the paper's code shows and learns).
        learn: each pair is learned by a temporary adapter once it is scored, which lives as long as the document.
    """

    answerer: Answerer
    pairs: int | None = None
    names: tuple[str, str] = ("Chinese", "English")
    own: bool = False
    learn: LearnOptions | None = None

    def __call__(self, arm: Arm, segments: Sequence[Segment]) -> Iterator[Translated]:
        done = list(segments[0].before)
        pairs = self.pairs if self.pairs is not None else len(done) or 3
        with nullcontext() if self.learn is None else temp_lora(self.answerer.model, self.learn) as learner:
            for segment in segments:
                shown = [self._pair(source) + f" {target}\n\n" for source, target in recent(done, pairs)]
                prompt = self.answerer.encode("".join([TASK, *shown, self._pair(segment.source)]))
                ids = self.answerer.wrap(prompt)
                ids = cut_middle(ids, arm.keep) if arm.keep else ids
                output = self.answerer.answer(arm, ids).strip()
                reference = self.answerer.encode(f" {segment.reference}")
                nll = None if arm.answer is not None else reference_nll(self.answerer.model, ids, reference)
                shown_later = output if self.own else str(segment.reference)
                if learner is not None and shown_later:
                    learner.learn(ids[None], self.answerer.encode(f" {shown_later}\n")[None])
                done.append((segment.source, shown_later))
                yield Translated(output, nll, len(reference))

    def _pair(self, source: str) -> str:
        return PAIR.format(source_name=self.names[0], target_name=self.names[1], source=source)


@torch.no_grad()
def reference_nll(model, prompt: Tensor, reference: Tensor) -> float:
    """Mean NLL in nats of the tokens `reference` [m] after `prompt` [n]."""
    ids = torch.cat((prompt, reference)).to(model.device)
    logits = model(input_ids=ids[None, :-1], use_cache=False, logits_to_keep=len(reference)).logits[0].float()
    return cross_entropy(logits, ids[len(prompt) :]).item()


@dataclass
class Translation:
    """The evaluation: BLEU of each segment, reference perplexity ("nll"), COMET where a model is named.

    Every document goes through each of `translators`, by name; corpus BLEU comes from `generation.corpus_bleu`.
    """

    translators: dict[str, Translator]
    language: str = "en"
    comet_model: str | None = None

    def measure(self, arm: Arm, sample: Sample, work: Work) -> Iterator[Measurement]:
        segments: list[Segment] = sample.content
        for name, translate in self.translators.items():
            if translate.learn is not None and arm.answer is not None:
                continue
            done = list(translate(arm, segments))
            for number, (segment, translated) in enumerate(zip(segments, done, strict=True)):
                part: dict[str, Any] = {"segment": number}
                detail = {"source": segment.source, "answer": translated.output, "reference": segment.reference}
                setting = {"translator": name}
                score = sentence_bleu(translated.output, str(segment.reference), self.language)
                yield Measurement("bleu_sentence", score, "%", 1, setting, detail, part)
                if translated.nll is not None:
                    yield Measurement("nll", translated.nll, "nat", translated.tokens, setting, part=part)
            if self.comet_model is not None:
                sources, targets = [s.source for s in segments], [str(s.reference) for s in segments]
                marks = comet(sources, [t.output for t in done], targets, self.comet_model)
                for number, mark in enumerate(marks):
                    yield Measurement("comet", mark, settings={"translator": name}, part={"segment": number})
