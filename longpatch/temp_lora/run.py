"""One generation: what happens between the forwards of one call of `model.generate`.

`generate` itself writes the text. Two things are set on the model while it runs: a wrapper around its stopping
criteria, which are shown the whole text after each token, and a forward pre-hook, which is called exactly when
generation goes on. The hook learns what is due, builds the cache anew in place, and fits the forward's arguments to it.
"""

import functools
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from ..errors import LongpatchError
from .columns import Columns
from .learner import Learned, Learner
from .options import GeneratorOptions
from .saved import refused_settings, restore_run, save_run
from .visible import row_starts, sinks_of, visible

NEVER = 2**62


class Run:
    """State of one generation.

    Attributes:
        text: [rows, n] so far, prompt included; `first` [rows]: each row's first token; `end` [rows]: where rows ended.
        learned: tokens learned, or never to be learned (a prompt).
        prompt_tokens: of the whole run; `given_tokens`: of this call, which goes on from a checkpoint or begins it.
        columns: the cache, and the tokens that it holds; `age`: chunks since it was built anew.
    """

    def __init__(self, learner: Learner, options: GeneratorOptions, folder: Path | None, objects: list[str]):
        self.learner, self.options, self.folder, self.objects = learner, options, folder, objects
        self.causal: Any = learner.causal
        self.history: list[dict[str, float]] = []
        self.text: Tensor
        self.first: Tensor
        self.end: Tensor
        self.columns: Columns
        self.learned = self.prompt_tokens = self.given_tokens = self.age = 0
        self.elapsed = 0.0
        self.max_time: float | None = None
        self._resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.began = self._clock = time.perf_counter()
        self._started = self._busy = False
        self.config: Any = None
        self._bar: Any = None

    @property
    def reuse_chunks(self) -> int:
        if self.options.cache_reuse_chunks is not None:
            return self.options.cache_reuse_chunks
        # a cache that is kept for ever has to be one that does not grow
        return NEVER if self.learner.options.trainable == "queries" and hasattr(self.causal, "longpatch") else 1

    @property
    def _room(self) -> int:
        """Tokens that a cache built anew holds."""
        return sinks_of(self.causal) + self.options.inference_context

    @contextmanager
    def watching(self):
        """Set hook and wrapper on the model, for one call of generate."""
        name = "_get_stopping_criteria"
        original = getattr(self.causal, name, None)
        if original is None:
            raise LongpatchError("TempLoraGenerator", [f"this version of transformers has no generate.{name}"])
        before = vars(self.causal).get(name)
        vars(self.causal)[name] = functools.partial(self._criteria, original)
        hook = self.causal.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            if before is None:
                del vars(self.causal)[name]
            else:
                vars(self.causal)[name] = before
            if self._bar is not None:
                self._bar.close()

    def _criteria(self, original, generation_config, *args, **kwargs) -> StoppingCriteriaList:
        mode = generation_config.get_generation_mode()
        reasons = []
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            reasons.append(f"{mode.value.replace('_', ' ')}: there is no one line of text to learn from")
        if generation_config.use_cache is False:
            reasons.append("use_cache=False")
        if generation_config.prefill_chunk_size is not None:
            reasons.append("prefill_chunk_size (no more than the inference context is read at once)")
        if generation_config.guidance_scale not in (None, 1):
            reasons.append("guidance_scale: a second text, without a prompt, that learns nothing")
        if self.folder is not None:
            reasons += refused_settings(generation_config)
        if reasons:
            raise LongpatchError("TempLoraGenerator.generate", reasons, "greedy decoding and sampling")
        self.config, self.max_time = generation_config, generation_config.max_time
        if self.max_time is not None:
            generation_config.max_time = max(0.0, self.max_time - self.elapsed)
        return Watched(original(generation_config, *args, **kwargs), self.written)

    def written(self, text: Tensor, done: Tensor) -> Tensor:
        """Told the text [rows, n] after each token and which rows are done; returns which rows are."""
        self.text = text
        ended = self.end < text.shape[1]
        if self._resumed is not None and self.config._eos_token_tensor is not None:
            # generate no longer knows of rows that had ended before its first step
            text[ended, -1] = self.config._pad_token_tensor.to(text.device)
            self._resumed = None
        done = done | ended
        self.end = torch.where(done & (self.end == NEVER), text.shape[1], self.end)
        if self._bar is not None:
            self._bar.update(1)
        return done

    def _before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._busy:
            return None
        self._busy = True
        try:
            first = not self._started
            if first:
                self._begin(kwargs)
            self._advance()
            if first and self.columns.shift is None and self.text.shape[1] > self._room:
                self._rebuild()  # a prompt of which not all is visible
        finally:
            self._busy = False
        return args, self.columns.arguments(kwargs, self.text)

    def _begin(self, kwargs: dict[str, Any]) -> None:
        self._started = True
        self.columns = Columns(kwargs.get("past_key_values"))
        self.text = kwargs["input_ids"]
        rows, count = self.text.shape
        mask = kwargs.get("attention_mask")
        self.first = self.text.new_zeros(rows) if mask is None else row_starts("TempLoraGenerator.generate", mask)
        if self.options.learn_prompt and self.first.any():
            raise LongpatchError(
                "TempLoraGenerator.generate",
                ["learn_prompt with padding: chunks would not be cut where they are in a row alone"],
                "prompts of one length, or a row at a time",
            )
        self.end = torch.full_like(self.first, NEVER)
        self.prompt_tokens = self.given_tokens = count
        self.learned = 0 if self.options.learn_prompt else count
        if self._resumed is None:
            self.learner.start(rows)
            save_run(self)
        else:
            restore_run(self, *self._resumed)
        if self.options.progress:
            total = self.config.max_length - self.prompt_tokens if self.config.max_length else None
            done = self.text.shape[1] - self.prompt_tokens
            self._bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, mininterval=1)
        self._clock = time.perf_counter()

    def _advance(self) -> None:
        """Learn every whole chunk that is due; then, if the cache is old, build it anew."""
        count, chunk = self.text.shape[1], self.options.chunk_tokens
        while self.learned + chunk <= count:
            stop = self.learned + chunk
            now = time.perf_counter()
            entry = {"start": self.learned, "stop": stop, "generate_seconds": now - self._clock}
            before = self._score(self.learned, stop) if self.options.measure and self.learner.options.dropout else None
            learned = self._learn(self.learned, stop)
            before = learned.nll if before is None else before  # without dropout learning's first forward is the score
            entry |= {"learn_seconds": learned.seconds, "loss": learned.losses[-1] if learned.losses else float("nan")}
            entry |= {"perplexity_before": _perplexity(before), "perplexity_after": float("nan")}
            entry["rebuild_seconds"] = 0.0
            self.learned = stop
            self.age += 1
            if self.options.measure:
                entry["perplexity_after"] = _perplexity(self._score(stop - chunk, stop))
            last = self.learned + chunk > count
            if last and (self.age >= self.reuse_chunks or not self.columns.cache.get_seq_length()):
                began = time.perf_counter()
                self._rebuild()
                entry["rebuild_seconds"] = time.perf_counter() - began
            self.history.append(entry)
            self._clock = time.perf_counter()
            save_run(self)
            self._show(entry)

    def _seen(self, stop: int, tokens: int):
        """What is visible of the text before token `stop`, and its mask with every row's padding."""
        return visible(self.text[:, :stop], self.full_mask(stop), tokens, sinks_of(self.causal))

    def full_mask(self, stop: int) -> Tensor | None:
        if not self.first.any():
            return None
        return (torch.arange(stop, device=self.first.device) >= self.first[:, None]).long()

    def _chunk(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        seen = self._seen(start, self.options.context_tokens)
        columns = torch.arange(start, stop, device=self.text.device)
        there = (columns >= self.first[:, None]) & (columns < self.end[:, None])
        mask = None
        if self.first.any():
            before = torch.ones_like(seen.ids) if seen.mask is None else seen.mask
            mask = torch.cat((before, (columns >= self.first[:, None]).long()), dim=1)
        return seen.ids, self.text[:, start:stop], mask, there

    def _learn(self, start: int, stop: int) -> Learned:
        context, new, mask, there = self._chunk(start, stop)
        return self.learner.learn(context, new, attention_mask=mask, loss_mask=there)

    def _score(self, start: int, stop: int) -> Tensor:
        context, new, mask, there = self._chunk(start, stop)
        return self.learner.score(context, new, mask).masked_fill(~there, torch.nan)

    def _rebuild(self) -> None:
        count = self.text.shape[1]
        self.columns.build(self.causal, self._seen(count, self.options.inference_context), count)
        self.age = 0

    def _show(self, entry: dict[str, float]) -> None:
        if self._bar is not None:
            shown = {"loss": entry["loss"], "ppl": entry["perplexity_before"], "after": entry["perplexity_after"]}
            self._bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})

    def resume_from(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Go on from a saved state at the first forward."""
        self._resumed = tensors, data
        self.elapsed = data["elapsed"]
        self.history += data["history"]


class Watched(StoppingCriteriaList):
    """Stopping criteria that tell a run what they are shown and what they decide."""

    def __init__(self, criteria: StoppingCriteriaList, tell):
        super().__init__(criteria)
        self.tell = tell

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.tell(input_ids, super().__call__(input_ids, scores, **kwargs))


def _perplexity(nll: Tensor) -> float:
    scored = nll[~nll.isnan()]
    return scored.mean().exp().item() if len(scored) else float("nan")
