"""Translation-like work: one segment after the other, each prompt showing recent pairs, each answer learned."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..errors import LongpatchError
from .learner import Learner
from .options import LearnOptions, make_options
from .targets import check_model

Pair = tuple[str, str]
Template = Callable[[Sequence[Pair], str], str]
TRAIN_ON = ("output", "reference")


@dataclass(frozen=True)
class Segment:
    """A piece of a document: what is given, and what is wanted where that is known.

    `before` are pairs known to come before it: from there on they are shown instead of those answered so far.
    """

    source: str
    reference: str | None = None
    before: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came of one segment; `loss` in nats of each epoch on what was learned, none where nothing was."""

    output: str
    losses: list[float]


def pairs_template(source_name: str = "Chinese", target_name: str = "English") -> Template:
    """Plain text: each pair as two named lines, an empty line between pairs."""

    def render(pairs: Sequence[Pair], source: str) -> str:
        shown = [f"{source_name}: {given}\n{target_name}: {wanted}\n\n" for given, wanted in pairs]
        return "".join(shown) + f"{source_name}: {source}\n{target_name}:"

    return render


def chat_template(tokenizer: Any, instruction: str = "Translate into English:\n") -> Template:
    """The tokenizer's own template: pairs are earlier turns."""

    def render(pairs: Sequence[Pair], source: str) -> str:
        turns = []
        for given, wanted in pairs:
            turns += [{"role": "user", "content": instruction + given}, {"role": "assistant", "content": wanted}]
        turns.append({"role": "user", "content": instruction + source})
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    return render


def read_segments(path: Path, context: str = "k3") -> list[Segment]:
    """Segments of a JSON or JSON-lines file, in order.

    GuoFeng's rows `{"contexts": {"k1": [...], "k3": [...]}, "inference": [{"zh", "en"}, ...]}`, or plain rows
    `{"source": ..., "reference": ...}`; "target" is read as "reference". A file of GuoFeng is a book, each row going on
    from the one before. `context` chooses the pairs that come before the first: about 1,000 or 3,000 tokens of them.
    The contexts of later rows are left out: they hold the references of what is to be translated.
    """
    text = Path(path).read_text(encoding="utf-8")
    rows = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )
    segments: list[Segment] = []
    for number, row in enumerate(rows):
        if "inference" in row:
            segments += guofeng_segments(row, context, first=not number)
        elif "source" in row:
            segments.append(Segment(row["source"], row.get("reference", row.get("target"))))
        else:
            reason = f"row {number} of {path} has the keys {', '.join(row)}"
            raise LongpatchError("read_segments", [reason], "'inference' (GuoFeng) or 'source'")
    return segments


def guofeng_segments(row: dict[str, Any], context: str, first: bool) -> list[Segment]:
    """Segments of one row of GuoFeng; `first`: of its book, which alone has pairs that come before."""
    contexts = row.get("contexts", {})
    if contexts and context not in contexts:
        raise LongpatchError("GuoFeng", [f"a row has no context {context!r}"], ", ".join(contexts))
    before = tuple((pair["zh"], pair["en"]) for pair in contexts.get(context, ())) if first else ()
    pairs = [(pair["zh"], pair["en"]) for pair in row["inference"]]
    return [Segment(zh, en, () if number else before) for number, (zh, en) in enumerate(pairs)]


def recent(done: Sequence[Pair], pairs: int) -> Sequence[Pair]:
    """The last `pairs` of `done`."""
    return done[max(0, len(done) - pairs) :]


def generate_segments(
    model: Any,
    tokenizer: Any,
    segments: Iterable[Segment],
    *,
    template: Template | None = None,
    pairs: int | None = None,
    train_on: str = "output",
    stop_strings: Sequence[str] = ("\n",),
    max_new_tokens: int = 256,
    learn: LearnOptions | dict[str, Any] | None = None,
    **generate: Any,
) -> Iterator[Answer]:
    """Answer each segment, then learn the pair, so that later answers keep to its names and tone.

    The prompt's own tokens are not learned. Between two answers the model is as it was.

    Args:
        pairs: so many of the last pairs are shown; None = as many as the latest `before` had, 3 where there was none.
        template: renders pairs and a source as a prompt; default: the tokenizer's chat template, else named lines.
        train_on: what is learned and shown: the model's own "output", or the "reference", as the paper's GuoFeng code
            does, which hands later segments the reference translation of earlier ones.
        stop_strings: text that ends an answer, and is not part of it.
        learn: `LearnOptions`, or its fields.
        generate: for `model.generate`.

    Raises:
        LongpatchError: for settings that are out of range, or a segment without the reference that is to be learned.
    """
    check_model(model)
    segments = list(segments)
    options = learn if isinstance(learn, LearnOptions) else make_options(LearnOptions, None, learn or {})
    reasons = []
    if train_on not in TRAIN_ON:
        reasons.append(f"train_on={train_on!r} must be one of {', '.join(TRAIN_ON)}")
    if train_on == "reference":
        reasons += [f"segment {n} has no reference" for n, segment in enumerate(segments) if segment.reference is None]
    if reasons:
        raise LongpatchError("generate_segments", reasons)
    if template is None:
        template = chat_template(tokenizer) if tokenizer.chat_template else pairs_template()
    stops = [stop for stop in stop_strings if stop]
    learner = Learner(model, options)
    done: list[Pair] = []
    shown = 3 if pairs is None else pairs
    for segment in segments:
        if segment.before:
            done = list(segment.before)
            shown = len(done) if pairs is None else pairs
        prompt = _encode(tokenizer, template(recent(done, shown), segment.source), model.device, start=True)
        with learner.attached():
            output = _answer(model, tokenizer, prompt, stops, max_new_tokens, dict(generate))
            taught = (segment.reference if train_on == "reference" else output) or ""
            losses = _teach(learner, tokenizer, prompt, taught, stops)
        done.append((segment.source, taught))
        yield Answer(output, losses)


class _Said(StoppingCriteria):
    """A stop string was written after something else than space: one at the start ends nothing yet."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, stops: Sequence[str]):
        self.tokenizer, self.prompt_tokens, self.stops = tokenizer, prompt_tokens, stops

    def answer(self, ids: Tensor) -> str:
        """The text after the prompt, special tokens included; leading space is no part of it."""
        return self.tokenizer.decode(ids[0, self.prompt_tokens :], skip_special_tokens=False).lstrip()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        text = self.answer(input_ids)
        return torch.tensor([any(stop in text for stop in self.stops)], device=input_ids.device)


def _answer(model: Any, tokenizer: Any, prompt: Tensor, stops: list[str], most: int, generate: dict[str, Any]) -> str:
    said = _Said(tokenizer, prompt.shape[1], stops)
    criteria = StoppingCriteriaList([*generate.pop("stopping_criteria", ()), said])
    mask = torch.ones_like(prompt)
    text = said.answer(
        model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=most, stopping_criteria=criteria, **generate
        )
    )
    for stop in stops:
        text = text.split(stop, 1)[0]
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    return text.strip()


def _teach(learner: Learner, tokenizer: Any, prompt: Tensor, text: str, stops: list[str]) -> list[float]:
    """Learn `text` as the answer to `prompt`, and the stop that ends it."""
    if not text:
        return []
    before = tokenizer.decode(prompt[0, -1:])
    space = "" if before[-1:].isspace() else " "
    return learner.learn(prompt, _encode(tokenizer, space + text + "".join(stops[:1]), prompt.device)).losses


def _encode(tokenizer: Any, text: str, device: torch.device, start: bool = False) -> Tensor:
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if start and bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return torch.tensor([ids], device=device)
