"""A language model behind an OpenAI-compatible endpoint."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from .errors import LongpatchError

REFUSED = (400, 413, 422)  # statuses that concern what was sent, not the endpoint


class NoReply(LongpatchError):
    """The endpoint refused this prompt or replied with nothing; another prompt may do."""


class Throttle:
    """Lets callers through at even distances, `per_minute` of them; None: all at once."""

    def __init__(self, per_minute: float | None):
        self.gap = 60 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.gap
        time.sleep(turn - now)


@dataclass(frozen=True)
class Endpoint:
    """Call it with a prompt for the reply. Several threads may.

    Attributes:
        address: as in "http://localhost:8000/v1".
        model: the name the endpoint knows the model by.
        key: sent as a bearer token, where given.
        timeout_s: seconds to wait for a reply.
        retries: of a request that is refused for now (429, 5xx) or gets lost, with growing pauses or as the endpoint
            says.
        per_minute: requests at most, retries aside.
        max_tokens: of a reply; None: as the endpoint has it.

    Raises:
        NoReply: for a prompt that is refused, or gets an empty reply.
        LongpatchError: if the endpoint cannot be reached or does not reply as it should.
    """

    address: str
    model: str
    key: str | None = None
    timeout_s: float = 120
    retries: int = 2
    per_minute: float | None = None
    max_tokens: int | None = None
    _client: Any = field(init=False, repr=False, compare=False)
    _throttle: Throttle = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise LongpatchError("endpoint", ["the package openai is missing"], "pip install openai") from error
        client = OpenAI(
            base_url=self.address, api_key=self.key or "none", timeout=self.timeout_s, max_retries=self.retries
        )
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_throttle", Throttle(self.per_minute))

    def __call__(self, prompt: str, temperature: float = 0.0) -> str:
        from openai import OpenAIError

        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        self._throttle.wait()
        try:
            reply = self._client.chat.completions.create(
                model=self.model, temperature=temperature, messages=[{"role": "user", "content": prompt}], **limit
            )
            text = reply.choices[0].message.content
        except (OpenAIError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = f"{self.address}: {type(error).__name__}: {' '.join(str(error).split())}"
            kind = NoReply if getattr(error, "status_code", None) in REFUSED else LongpatchError
            raise kind("endpoint", [reason]) from error
        if not text:
            raise NoReply("endpoint", [f"{self.address}: an empty reply"])
        return text
