"""Scores of an answer against what was asked for. BLEU, ROUGE and COMET are their own libraries'."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from importlib.util import find_spec

from ..errors import LongpatchError

EVAL_INSTALL = 'pip install "longpatch[eval]"'
PACKAGES = {"BLEU": "sacrebleu", "ROUGE": "rouge_score", "COMET": "comet"}


def need(*metrics: str) -> None:
    """Raises LongpatchError naming every package missing for `metrics`, some of PACKAGES."""
    missing = [metric for metric in metrics if find_spec(PACKAGES[metric]) is None]
    if missing:
        reasons = [f"{metric} needs the package {PACKAGES[metric]}" for metric in missing]
        raise LongpatchError("metrics", reasons, "pip install unbabel-comet" if missing == ["COMET"] else EVAL_INSTALL)


def first_number(answer: str) -> str:
    found = re.search(r"\d+", answer)
    return found[0] if found else ""


def exact_number(answer: str, key: str) -> float:
    """Whether the first number in `answer` is `key`."""
    return float(first_number(answer) == key)


def similarity(answer: str, target: str) -> float:
    """0 to 1: how much of the two strings agrees in order (Ratcliff and Obershelp)."""
    return SequenceMatcher(None, target.strip(), answer.strip(), autojunk=False).ratio()


def contains(answer: str, target: str) -> float:
    """Whether `target` stands in `answer`, without regard to case and to where lines break."""
    answer, target = (" ".join(text.lower().split()) for text in (answer, target))
    return float(target in answer)


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and runs of blanks, as SQuAD compares answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that two answers share (SQuAD)."""
    mine, theirs = normalised(answer).split(), normalised(reference).split()
    shared = sum((Counter(mine) & Counter(theirs)).values())
    if not mine or not theirs:
        return float(mine == theirs)
    return 0.0 if not shared else 2 * shared / (len(mine) + len(theirs))


def best(metric: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The maximum over references."""
    return max(metric(answer, reference) for reference in references)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F-measure of rouge1, rouge2 and rougeL, with stemming, by rouge-score."""
    need("ROUGE")
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    return {name: score.fmeasure for name, score in scores.items()}


def bleu(answers: Sequence[str], references: Sequence[str], language: str = "en") -> float:
    """Corpus BLEU, 0 to 100, by sacrebleu; Chinese, Japanese and Korean by their own tokenisers."""
    need("BLEU")
    from sacrebleu.metrics.bleu import BLEU  # pyright: ignore[reportMissingImports]

    tokenise = {"zh": "zh", "ja": "char", "ko": "char"}.get(language, "13a")
    return BLEU(tokenize=tokenise).corpus_score(list(answers), [list(references)]).score


def sentence_bleu(answer: str, reference: str, language: str = "en") -> float:
    """BLEU of one answer, 0 to 100, smoothed as sacrebleu does by default for sentences."""
    need("BLEU")
    from sacrebleu.metrics.bleu import BLEU  # pyright: ignore[reportMissingImports]

    tokenise = {"zh": "zh", "ja": "char", "ko": "char"}.get(language, "13a")
    return BLEU(tokenize=tokenise, effective_order=True).sentence_score(answer, [reference]).score


def comet(sources: Sequence[str], answers: Sequence[str], references: Sequence[str], model: str) -> list[float]:
    """COMET scores by the package unbabel-comet, `model` one of its models or a checkpoint file."""
    need("COMET")
    from comet import download_model, load_from_checkpoint  # pyright: ignore[reportMissingImports]

    path = model if model.endswith(".ckpt") else download_model(model)
    rows = [{"src": s, "mt": a, "ref": r} for s, a, r in zip(sources, answers, references, strict=True)]
    return [float(score) for score in load_from_checkpoint(path).predict(rows, gpus=0).scores]
