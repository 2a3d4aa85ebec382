"""How the next token is chosen, and where text ends."""

from dataclasses import dataclass
from typing import Any

from ..data.tokens import Tokens
from ..errors import LongpatchError, at_least, is_number
from ..templates import answer_end


@dataclass(frozen=True)
class Sampling:
    """Arguments of `generate`.

    Attributes:
        new_tokens: at most so many at a time.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: of the tokens drawn from, the likeliest that make up this share of the probability.
        repetition_penalty: above 1, tokens that were used are less likely.
    """

    new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        reasons = at_least(1, new_tokens=self.new_tokens)
        for name, low, high in (("temperature", 0, 100), ("top_p", 1e-6, 1), ("repetition_penalty", 0.1, 10)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                reasons.append(f"{name}={value!r} must be a number from {low} to {high}")
        if reasons:
            raise LongpatchError("generate", reasons)

    def arguments(self, model: Any, tokenizer: Any, ends: tuple[int, ...] = ()) -> dict[str, Any]:
        """Keyword arguments; text ends with one of `ends` or with what model and tokenizer end theirs with."""
        configured = model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        ids = {token for token in (*configured, tokenizer.eos_token_id, *ends) if token is not None}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {
            "max_new_tokens": self.new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": sorted(ids) or None,
            "pad_token_id": min(ids, default=0),
            **(drawn if self.temperature else {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}),
        }


def end_tokens(tokens: Tokens, template: str) -> tuple[int, ...]:
    """The token that the template puts after an answer, where it is a special one."""
    after = tokens.inner(answer_end(tokens.tokenizer, template).lstrip())
    return tuple(token for token in after[:1] if token in tokens.special)
