"""A text that a user and a model take turns to write, read once."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from ..data.tokens import Tokens
from ..errors import LongpatchError
from ..temp_lora import Learner
from ..templates import PLACE, answer_end, find_template, render
from .sampling import Sampling, end_tokens
from .stopping import Stopped

READ = 1024  # tokens read in one forward
CONTEXT = 1024  # tokens before those that are learned


@dataclass(frozen=True)
class Reply:
    """An answer, and what it took: tokens and seconds of reading what was new, and of writing."""

    text: str
    stopped: bool
    read_tokens: int
    read_seconds: float
    new_tokens: int
    new_seconds: float


class Conversation:
    """Messages and the cache of all that was read: a turn reads what is new and nothing twice.

    Args:
        model: any causal language model of transformers, converted or not.
        template: as `find_template` takes it.
        sampling: how answers are written.
        learner: from `temp_lora`; learns each `learn_tokens` tokens of the conversation as it goes on. What is in the
            cache stays as it was read.
        system: a message that comes before all others.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str = "auto",
        sampling: Sampling | None = None,
        learner: Learner | None = None,
        learn_tokens: int = 256,
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.tokens = model, tokenizer, Tokens(tokenizer)
        self.template = find_template(tokenizer, template)
        self.sampling, self.learner, self.learn_tokens = sampling or Sampling(), learner, learn_tokens
        self._first = [{"role": "system", "content": system}] if system else []
        self._end, self._ends = answer_end(tokenizer, self.template), end_tokens(self.tokens, self.template)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, and what was learned from it."""
        self.messages: list[dict[str, str]] = list(self._first)
        self.ids: Tensor = torch.empty(1, 0, dtype=torch.long, device=self.model.device)
        self._cache: Any = None
        self._learned = 0
        if self.learner is not None:
            self.learner.reset()

    def say(self, text: str, streamer: TextStreamer | None = None, stop: threading.Event | None = None) -> Reply:
        """Put `text` to the model and return its answer.

        Once `stop` is set the answer ends; text that was not read yet is read in the next turn.

        Raises:
            LongpatchError: where the chat template refuses the message; the conversation is as it was.
        """
        stop = stop or threading.Event()
        new = self._turn(text)
        self.ids = torch.cat((self.ids, torch.tensor([new], device=self.ids.device)), dim=1)
        began, before = time.perf_counter(), self._seen
        whole = self._read(stop)
        read = time.perf_counter()
        asked = self.ids.shape[1]
        if whole:
            self._write(streamer, stop)
        written = self.ids.shape[1] - asked
        answer = self.tokenizer.decode(self.ids[0, asked:], skip_special_tokens=True)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        reply = Reply(answer, stop.is_set(), asked - before, read - began, written, time.perf_counter() - read)
        self._learn(stop)
        return reply

    @property
    def _seen(self) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length()

    def _turn(self, text: str) -> list[int]:
        """Ids from the end of the last answer to where the next one begins."""
        asked = {"role": "user", "content": text}
        if not self.ids.shape[1]:
            return self.tokens.plain(render(self.tokenizer, self.template, [*self.messages, asked], prompt=True))
        answered = [*self.messages[:-1], {"role": "assistant", "content": PLACE}, asked]
        _, found, after = render(self.tokenizer, self.template, answered, prompt=True).rpartition(PLACE)
        if not found:
            raise LongpatchError("chat", ["the chat template leaves earlier answers out"], "--chat-template NAME|FILE")
        end = self._end if after.startswith(self._end) else ""
        new = self.tokens.inner(end) + self.tokens.inner(after[len(end) :])
        first = next((place for place, token in enumerate(new) if token in self.tokens.special), None)
        if first is not None and new[first] == self.ids[0, -1].item():  # the model has written this end
            new = new[first + 1 :]
        return new

    @torch.no_grad()
    def _read(self, stop: threading.Event) -> bool:
        """Bring the cache up to all but the last token; False: it was stopped."""
        while self._seen < self.ids.shape[1] - 1:
            if stop.is_set():
                return False
            part = self.ids[:, self._seen : min(self._seen + READ, self.ids.shape[1] - 1)]
            output = self.model(input_ids=part, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
        return not stop.is_set()

    def _write(self, streamer: TextStreamer | None, stop: threading.Event) -> None:
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self._cache,
            streamer=streamer,
            stopping_criteria=[Stopped(stop)],
            **self.sampling.arguments(self.model, self.tokenizer, self._ends),
        )

    def _learn(self, stop: threading.Event) -> None:
        while self.learner is not None and not stop.is_set() and self.ids.shape[1] - self._learned >= self.learn_tokens:
            end = self._learned + self.learn_tokens
            self.learner.learn(
                self.ids[:, max(0, self._learned - CONTEXT) : self._learned], self.ids[:, self._learned : end]
            )
            self._learned = end
