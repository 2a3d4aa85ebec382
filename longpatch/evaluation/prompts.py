"""Prompts as token ids, inside a chat template where there is one, and the answers a model gives to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LongpatchError
from ..templates import find_template, render
from .arms import Arm

PLACE = "\x00the prompt\x00"
ARMS = ("original", "lambda", "truncate", "constant")


@dataclass(frozen=True)
class Template:
    """Token ids before and after a user's prompt: a chat template's, or BOS and nothing."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.before) + len(self.after)


def chat_template(tokenizer, name: str = "auto") -> Template:
    """The template called `name`, with the generation prompt.

    "auto" is the tokenizer's, where it has one; "none" puts BOS and nothing; else as `find_template` takes it.

    Raises:
        LongpatchError: for a name that is none of these.
    """
    if name == "none" or (name == "auto" and not tokenizer.chat_template):
        return Template(() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,))
    text = render(tokenizer, find_template(tokenizer, name), [{"role": "user", "content": PLACE}], prompt=True)
    before, found, after = text.partition(PLACE)
    if not found:
        raise LongpatchError("--chat-template", [f"{name!r} leaves the user's message out"])
    return Template(*(tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after)))


@dataclass(frozen=True)
class Answerer:
    """How prompts are put to a model, greedily.

    Attributes:
        new_tokens: at most so many are generated.
        stop: strings that end an answer.
    """

    model: Any
    tokenizer: Any
    template: Template
    new_tokens: int
    stop: tuple[str, ...] = ()

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)

    def wrap(self, prompt: Tensor, answer_start: str = "") -> Tensor:
        """Token ids of `prompt` [n] in the template; the answer begins with `answer_start`."""
        before, after = (torch.tensor(part, dtype=torch.long) for part in (self.template.before, self.template.after))
        return torch.cat((before, prompt, after, self.encode(answer_start)))

    def fixed_tokens(self, answer_start: str = "") -> int:
        """How many tokens `wrap` adds to a prompt."""
        return self.template.tokens + len(self.encode(answer_start))

    def answer(self, arm: Arm, ids: Tensor) -> str:
        """The answer of `arm` to the wrapped prompt `ids` [n], up to the first stop string."""
        if arm.answer is not None:
            return arm.answer
        ids = cut_middle(ids, arm.keep) if arm.keep else ids
        inputs = ids[None].to(self.model.device)
        stop = {"stop_strings": list(self.stop), "tokenizer": self.tokenizer} if self.stop else {}
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
            **stop,
        )
        return cut_at(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), self.stop)


def cut_middle(ids: Tensor, keep: int) -> Tensor:
    """The first and the last `keep` / 2 of `ids` [n], as the papers cut over-long prompts."""
    return ids if len(ids) <= keep else torch.cat((ids[: keep - keep // 2], ids[len(ids) - keep // 2 :]))


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the strings in `stop`."""
    return min((text.partition(mark)[0] for mark in stop if mark), key=len, default=text)


def bury(units: Sequence[Tensor], needle: Tensor, depth: float, room: int) -> tuple[Tensor, float]:
    """`room` tokens of filler with `needle` inside; returns them and the depth at which it came to lie.

    The filler repeats `units` (sentences, [n] ids each) from the first one on; the needle goes between two of them,
    where that is nearest to `depth` (0 = start, 1 = end).

    Raises:
        LongpatchError: if the needle does not fit.
    """
    space = room - len(needle)
    if space < 0 or not any(len(unit) for unit in units):
        raise LongpatchError("bury", [f"{len(needle)} tokens of needle, {room} of room"], "a greater length")
    filler, boundaries, length = [], [0], 0
    while length < space:
        for unit in units:
            filler.append(unit)
            length += len(unit)
            boundaries.append(min(length, space))
            if length >= space:
                break
    text = torch.cat([needle.new_empty(0), *filler])[:space]
    place = min(boundaries, key=lambda boundary: abs(boundary - depth * space))
    return torch.cat((text[:place], needle, text[place:])), place / max(1, space)


def sentences(tokenizer, text: str) -> list[Tensor]:
    """`text` as token ids, cut after full stops; each begins with a blank, as words in the middle of a text do."""
    parts = [f" {part.removesuffix('.')}." for part in text.strip().split(". ") if part]
    ids = tokenizer(parts, add_special_tokens=False).input_ids
    return [torch.tensor(part, dtype=torch.long) for part in ids if part]
