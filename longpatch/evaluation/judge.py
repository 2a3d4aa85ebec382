"""A language model behind an OpenAI-compatible endpoint that marks answers."""

import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass

from ..errors import LongpatchError

PROMPT = """\
Question: {question}
Reference answer: {target}
Answer to mark: {answer}

How well does the answer agree with the reference? Reply with one whole number from 1 (not at all) to 10 (fully)."""


@dataclass(frozen=True)
class Judge:
    """Call it with question, target and answer for a mark of 0 to 1.

    Attributes:
        endpoint: base address, as in "http://localhost:8000/v1".
        model: the name the endpoint knows the model by.
        key: sent as a bearer token, where given.
        timeout_s: seconds to wait for a reply.

    Raises:
        LongpatchError: if the endpoint cannot be reached or replies without a number.
    """

    endpoint: str
    model: str
    key: str | None = None
    timeout_s: float = 120

    def __call__(self, question: str, target: str, answer: str) -> float:
        content = PROMPT.format(question=question.strip(), target=target, answer=answer)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = f"{self.endpoint.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, TimeoutError, KeyError, IndexError, ValueError) as error:
            raise LongpatchError("judge", [f"{address}: {type(error).__name__}: {error}"]) from error
        found = re.search(r"\b(10|[1-9])\b", text)
        if not found:
            raise LongpatchError("judge", [f"the reply {text[:100]!r} holds no number from 1 to 10"])
        return (int(found[1]) - 1) / 9
