"""A raw row becomes tokens, and which of them are trained."""

from typing import Any, NamedTuple

import numpy as np

from ..errors import LongpatchError
from .sources import Source

SUPPORTED = "{text}; {messages: [{role, content}, ...]}; {input or instruction, output}"


class Document(NamedTuple):
    """Token ids `[n]` uint32, and for each whether it is trained; None: all are."""

    ids: np.ndarray
    trained: np.ndarray | None


class Encoder:
    """Turns raw rows into documents: a text is trained throughout, of a conversation the answers alone."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, source: Source) -> Document:
        """Raises LongpatchError naming the row's place."""
        row = source.row
        match row:
            case {"text": str(text)}:
                return Document(self._ids(text, special=True), None)
            case {"messages": list(messages)}:
                return self._conversation(source.place, messages)
            case {"instruction": str(question), "output": str(answer)}:
                context = row.get("input") or ""
                return self._answer(f"{question}\n\n{context}" if context else question, answer)
            case {"input": str(question), "output": str(answer)}:
                return self._answer(question, answer)
        raise LongpatchError("read_sources", [f"{source.place} has the fields {', '.join(row) or 'none'}"], SUPPORTED)

    def _ids(self, text: str, special: bool = False) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=special, verbose=False), dtype=np.uint32)

    def _answer(self, question: str, answer: str) -> Document:
        """`question`, a line break, `answer`, EOS; by the tokenizer's chat template where it has one."""
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return self._conversation("", messages)
        prompt = self._ids(f"{question}\n", special=True)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        reply = np.concatenate((self._ids(answer), np.asarray(end, dtype=np.uint32)))
        trained = np.repeat([False, True], [len(prompt), len(reply)])
        return Document(np.concatenate((prompt, reply)), trained)

    def _conversation(self, place: str, messages: list) -> Document:
        """Each assistant turn with its end token is trained: what the template adds from one prefix to the next."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise LongpatchError("read_sources", [f"{place}: the tokenizer has no chat template for messages"])
        if not all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in messages) or not messages:
            raise LongpatchError("read_sources", [f"{place}: messages are not a list of {{role, content}}"], SUPPORTED)
        ids = np.empty(0, dtype=np.uint32)
        trained: list[bool] = []
        for count, turn in enumerate(messages, start=1):
            answer = turn["role"] == "assistant"
            if answer:
                ids, trained = self._extend(place, ids, trained, messages[: count - 1], prompt=True, learn=False)
            ids, trained = self._extend(place, ids, trained, messages[:count], prompt=False, learn=answer)
        return Document(ids, np.asarray(trained))

    def _extend(self, place: str, ids: np.ndarray, trained: list[bool], messages: list, prompt: bool, learn: bool):
        longer = self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        longer = self._ids(longer)
        if not np.array_equal(longer[: len(ids)], ids):
            raise LongpatchError("read_sources", [f"{place}: the chat template rewrites earlier turns"])
        return longer, trained + [learn] * (len(longer) - len(ids))
