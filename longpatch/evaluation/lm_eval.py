"""The model "longpatch" of lm-evaluation-harness: its own Hugging Face model around one that longpatch opened.

lm-eval has no entry points for outside models; `longpatch lm-eval` registers this class and hands over.
"""

import logging
from typing import Any, cast

import torch
from accelerate import Accelerator
from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from ..convert import convert_model
from ..errors import LongpatchError
from ..families import trained_length
from ..interpolation import interpolate_rope
from ..models import load_model
from ..recall import Recall
from .prompts import cut_middle
from .run import process_state

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
        attn: as the flag --attn, `recall` as the flag --recall.
        rope_method, rope_factor, rope_theta: positions stretched, as the flags --rope-method, ...
        peft: a LoRA on top.
        truncation: what becomes of an input longer than `max_length`: "error" (the default), or "left", "right" or
            "center", the part that is cut out. Nothing is cut in silence.
        max_length: tokens of the longest input, to which no room is added for what is generated. Default: a million for
            a converted model; else its trained length, of which a prompt leaves room for its answer.

    Under `accelerate launch` or torchrun each process takes its share of the requests, on its own device.

    Raises:
        LongpatchError: for settings that are none, for an over-long input when truncation is "error", and where
            batch_size=auto has no length to try.
    """

    def __init__(
        self,
        pretrained: str,
        local_branch: int | None = None,
        global_branch: int | None = None,
        limit_distance: int | None = None,
        convert: bool = True,
        attn: str = "auto",
        recall: str | None = None,
        rope_method: str | None = None,
        rope_factor: float | None = None,
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
        processes = process_state()  # which chooses this one's device
        model, tokenizer = load_model(
            pretrained,
            getattr(torch, dtype),
            adapter=peft,
            device_map=device_map,
            quantization="nf4" if load_in_4bit else "none",
        )
        rope: dict[str, Any] = {"method": rope_method, "factor": rope_factor, "theta": rope_theta}
        if any(value is not None for value in rope.values()):
            interpolate_rope(model, **rope)
        if convert:
            chosen = recall if recall is None else recall != "none" and Recall.parse(recall)
            convert_model(
                model,
                local_branch,
                global_branch,
                limit_distance=limit_distance,
                implementation=attn,
                recall=chosen,
            )
        if device_map is None and not load_in_4bit:
            model.to(device if device and torch.cuda.is_available() else "cpu")
        trained = trained_length(model.config)
        longest = max_length or (UNBOUNDED if convert else trained)
        super().__init__(model, tokenizer=tokenizer, max_length=longest, dtype=dtype, **options)
        self.cut, self.asked_length, self.bounded = truncation, max_length, bool(max_length) or not convert
        if processes.num_processes > 1:  # lm-eval does so for models that it opens itself
            self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self._rank, self._world_size = processes.process_index, processes.num_processes

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

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        if requests is None and not self.bounded:  # it would try the longest input there can be
            reason = "batch_size=auto, where prompts may have any length"
            raise LongpatchError("lm-eval", [reason], "a number, or max_length=N")
        return super()._detect_batch_size(requests, pos)

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
        """Token ids and mask [B, n], padded on `padding_side`; where `left_truncate_len` is given rows are cut.

        To the `max_length` that was asked for, or to `left_truncate_len`, which lm-eval makes of the model's.
        """
        rows = [cast(list[int], self.tok_encode(string)) for string in strings]
        if left_truncate_len is not None:
            rows = [self.shorten(row, self.asked_length or left_truncate_len) for row in rows]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]


def register() -> None:
    """Make "longpatch" known to lm-eval in this process."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=LongpatchLM)
