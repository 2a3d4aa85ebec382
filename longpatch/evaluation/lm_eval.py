"""The model "longpatch" of lm-evaluation-harness: its own Hugging Face model around one that longpatch opened.

lm-eval has no entry points for outside models; `longpatch lm-eval` registers this class and hands over.
"""

import logging
from typing import Any, cast

import torch
from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from ..convert import convert_model
from ..errors import LongpatchError
from ..families import trained_length
from ..models import load_model
from .prompts import cut_middle

NAME = "longpatch"
TRUNCATIONS = ("error", "left", "right", "center")
UNBOUNDED = 1_000_000
_log = logging.getLogger(__name__)

_Base: Any = HFLM  # its decorator hides its type from type checkers


class LongpatchLM(_Base):
    """Model arguments beside those of lm-eval's "hf" that make sense for an open model (batch_size, max_length, ...):

    Args:
        pretrained: a folder, a hub name, a .gguf file, "demo" or "smollm2".
        local_branch: window in tokens, `global_branch` sinks, `limit_distance`: as in `convert_model`.
        convert: False leaves the model as it is.
        rope_theta: another base of the rotary frequencies.
        peft: a LoRA on top.
        truncation: what becomes of an input longer than `max_length`: "error" (the default), or "left", "right" or
            "center", the part that is cut out. Nothing is cut in silence.
        max_length: tokens of the longest input. Default: a million for a converted model, else its trained length.

    Raises:
        LongpatchError: for settings that are none, and for an over-long input when truncation is "error".
    """

    def __init__(
        self,
        pretrained: str,
        local_branch: int | None = None,
        global_branch: int | None = None,
        limit_distance: int | None = None,
        convert: bool = True,
        rope_theta: float | None = None,
        peft: str | None = None,
        truncation: str = "error",
        max_length: int | None = None,
        dtype: str = "float32",
        device: str | None = "cuda",
        device_map: str | None = None,
        load_in_4bit: bool = False,
        **options: Any,
    ):
        if truncation not in TRUNCATIONS:
            raise LongpatchError("lm-eval", [f"truncation={truncation!r}"], ", ".join(TRUNCATIONS))
        model, tokenizer = load_model(
            pretrained,
            getattr(torch, dtype),
            adapter=peft,
            device_map=device_map,
            quantization="nf4" if load_in_4bit else "none",
        )
        if rope_theta is not None:
            set_rope_theta(model, float(rope_theta))
        if convert:
            convert_model(model, local_branch, global_branch, limit_distance=limit_distance)
        if device_map is None and not load_in_4bit:
            model.to(device if device and torch.cuda.is_available() else "cpu")
        trained = trained_length(model.config)
        longest = max_length or (UNBOUNDED if convert else trained)
        super().__init__(model, tokenizer=tokenizer, max_length=longest, dtype=dtype, **options)
        self.cut = truncation

    def shorten(self, tokens: list[int], room: int) -> list[int]:
        """`tokens` cut to `room` as `truncation` says, with a warning.

        Raises:
            LongpatchError: where truncation is "error" and they do not fit.
        """
        if len(tokens) <= room:
            return tokens
        if self.cut == "error" or room < 1:
            raise LongpatchError(
                "lm-eval",
                [f"an input of {len(tokens)} tokens, room for {room}"],
                "a greater max_length, or truncation=left, right or center",
            )
        _log.warning("longpatch: %d tokens cut to %d (%s)", len(tokens), room, self.cut)
        if self.cut == "center":
            return cut_middle(torch.tensor(tokens), room).tolist()
        return tokens[-room:] if self.cut == "left" else tokens[:room]

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        fitting = [
            (strings, self.shorten(context, self.max_length + 1 - len(continuation)), continuation)
            for strings, context, continuation in requests
        ]
        return super()._loglikelihood_tokens(fitting, *args, **kwargs)

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask [B, n], padded on `padding_side`; rows longer than `left_truncate_len` are cut."""
        rows = [cast(list[int], self.tok_encode(string)) for string in strings]
        rows = [row if left_truncate_len is None else self.shorten(row, left_truncate_len) for row in rows]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]


def set_rope_theta(model: Any, theta: float) -> None:
    """Give an open model another base of its rotary frequencies."""
    config = model.config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    base = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=config).to(model.device)


def register() -> None:
    """Make "longpatch" known to lm-eval in this process."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=LongpatchLM)
