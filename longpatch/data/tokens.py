"""Text becomes token ids: whole, or piece by piece with the same result."""

import hashlib
import json
from typing import Any

PROBE = "The year 1,984 — naïve “quotes”,\n\n\tdef f(x): return x**2  # 你好 🙂"


class Tokens:
    """What a tokenizer does with texts, pieces of texts and its special tokens.

    Attributes:
        special: ids of special tokens, such as those that end a turn.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._newline = self.plain("\n")
        word, whole = self.plain("a"), tokenizer.encode("a", verbose=False)
        first = next((i for i in range(len(whole)) if whole[i : i + len(word)] == word), 0)
        self._before, self._after = whole[:first], whole[first + len(word) :]

    def plain(self, text: str) -> list[int]:
        """Ids of `text` with no special token around it."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def inner(self, text: str) -> list[int]:
        """Ids of `text` as it stands inside a longer one: no space is put before its first word."""
        after_newline = self.plain("\n" + text)
        if after_newline[: len(self._newline)] == self._newline:
            return after_newline[len(self._newline) :]
        return self.plain(text)

    def text(self, text: str, first: bool = True, last: bool = True) -> list[int]:
        """Ids of a text or, where it does not begin or end here, of a piece; with the tokenizer's special tokens."""
        ids = self.plain(text) if first else self.inner(text)
        return (self._before if first else []) + ids + (self._after if last else [])


def fingerprint(tokenizer: Any) -> str:
    """Alike for tokenizers that make the same ids: of the vocabulary, and of how a probe is cut."""
    made = (sorted(tokenizer.get_vocab().items()), tokenizer.encode(PROBE, verbose=False))
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
