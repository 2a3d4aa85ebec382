"""Learning from one chunk of text at a time, and the context manager for loops of one's own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import LongpatchError
from ..packing import unpacked
from .adapter import Adapter
from .loss import detached, scored_tokens, whole
from .options import LearnOptions, make_options
from .targets import check_model, find_targets
from .untouched import evaluating, frozen, own_randomness
from .visible import row_starts


@dataclass(frozen=True)
class Learned:
    """What learning one chunk gave.

    Attributes:
        nll: [rows, n] in nats, of the new tokens before any update that saw them, under the adapters as they were then
            (with their dropout, where there is one); nan where nothing predicted a token or it was masked.
        losses: mean loss of each epoch over all rows' tokens, in nats.
        seconds: wall time.
    """

    nll: Tensor
    losses: list[float]
    seconds: float


class Learner:
    """A temporary adapter on a model, and its optimiser. Made by `temp_lora`."""

    def __init__(self, model: Any, options: LearnOptions):
        self.model, self.options = model, options
        self.causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.targets = find_targets(self.causal, options)
        self.adapter: Adapter | None = None
        self.steps = 0  # calls of the optimisers, for seeds; a row's own count is what its rate warms up with
        self._row_steps: list[int] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._row_weights: list[list[Tensor]] = []

    def start(self, rows: int) -> Adapter:
        """Make adapters for `rows` rows, which change nothing yet."""
        if self.adapter is None:
            with torch.inference_mode(False):  # else nothing of it could ever learn
                self.adapter = Adapter(self.targets, self.options, rows)
                for row in range(rows):
                    self._row_weights.append([weights[row].detach() for weights in self.adapter.weights])
                    self._optimizers.append(self._optimizer(self._row_weights[row]))
            self._row_steps = [0] * rows
            self.adapter.attach()
        if self.adapter.rows != rows:
            raise LongpatchError("learn", [f"{rows} rows, but adapters for {self.adapter.rows} exist"])
        return self.adapter

    def stop(self) -> None:
        """Take the adapters off the model."""
        if self.adapter is not None:
            self.adapter.detach()

    @contextmanager
    def attached(self) -> Iterator["Learner"]:
        """Adapters are on the model, whose own parameters are frozen, until this is left."""
        with frozen(self.model), unpacked(self.model):
            try:
                if self.adapter is not None:
                    self.adapter.attach()
                yield self
            finally:
                self.stop()

    def reset(self) -> None:
        """Forget what was learned."""
        self.stop()
        self.adapter, self.steps, self._row_steps = None, 0, []
        self._optimizers.clear()
        self._row_weights.clear()

    def learn(
        self,
        context_ids: Tensor | None,
        new_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Learned:
        """Learn `new_ids` [rows, n] as they follow `context_ids` [rows, c]; each row teaches its own adapter.

        Loss is the mean over a row's new tokens that follow something and that `loss_mask` [rows, n] allows. A row
        without such tokens learns nothing.

        Args:
            attention_mask: [rows, c + n], 0 = left padding.

        Raises:
            LongpatchError: for shapes that do not fit together, or padding that is not on the left.
        """
        began = time.perf_counter()
        with torch.inference_mode(False):
            ids, count, mask, scored = self._checked(context_ids, new_ids, attention_mask, loss_mask)
            adapter = self.start(len(ids))
            if not scored.any():
                return Learned(torch.full_like(scored, torch.nan, dtype=torch.float32), [], 0.0)
            adapter.learning = True
            first, losses = None, []
            try:
                with (
                    torch.enable_grad(),
                    evaluating(self.causal, self.options.gradient_checkpointing),
                    own_randomness(self.options.seed + self.steps, [w.device for w in adapter.weights]),
                ):
                    once = not self.options.context_grad or self.options.trainable == "queries"
                    if once and ids.shape[1] - count >= 2:
                        forward = detached(self.causal, ids, count, mask)
                    else:
                        forward = partial(whole, self.causal, ids, count, mask)
                    for _ in range(self.options.epochs):
                        nll = forward()
                        weighted = torch.where(scored, nll, 0).sum(dim=1) / scored.sum(dim=1).clamp_min(1)
                        for gradient in adapter.gradients:
                            gradient.zero_()
                        weighted.sum().backward()
                        self._step(scored.any(dim=1).tolist())
                        nll = nll.detach()
                        first = nll if first is None else first
                        losses.append(nll[scored].mean().item())
            finally:
                adapter.learning = False
        assert first is not None
        return Learned(first.masked_fill(~scored, torch.nan), losses, time.perf_counter() - began)

    def _checked(
        self, context_ids: Tensor | None, new_ids: Tensor, attention_mask: Tensor | None, loss_mask: Tensor | None
    ) -> tuple[Tensor, int, Tensor | None, Tensor]:
        """Of what `learn` was given: ids [rows, c + n], n, the mask of padding, and which of the n teach [rows, n]."""
        new_ids = _two_dimensional("new_ids", new_ids).to(self.causal.device)
        rows, count = new_ids.shape
        if context_ids is None:
            context_ids = new_ids[:, :0]
        context_ids = _two_dimensional("context_ids", context_ids).to(new_ids.device)
        total = context_ids.shape[1] + count
        for name, tensor, shape in (
            ("context_ids", context_ids, (rows, context_ids.shape[1])),
            ("attention_mask", attention_mask, (rows, total)),
            ("loss_mask", loss_mask, (rows, count)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise LongpatchError("learn", [f"{name} has shape {list(tensor.shape)}"], f"{list(shape)}")
        if attention_mask is not None:
            starts = row_starts("learn", attention_mask)
            attention_mask = attention_mask.to(new_ids.device, copy=True) if starts.any() else None
        # copies, as tensors made in inference mode cannot be learned from
        ids = torch.cat((context_ids, new_ids), dim=1).clone()
        return ids, count, attention_mask, scored_tokens(ids, count, attention_mask, loss_mask)

    @torch.no_grad()
    def score(self, context_ids: Tensor | None, new_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """NLL [rows, n] in nats of `new_ids` after `context_ids`, the adapters as they are; nan for a first token."""
        context_ids = new_ids[:, :0] if context_ids is None else context_ids
        ids, count = torch.cat((context_ids, new_ids), dim=1).to(self.causal.device), new_ids.shape[1]
        mask = None if attention_mask is None else attention_mask.to(ids.device)
        return whole(self.causal, ids, count, mask).masked_fill(~scored_tokens(ids, count, mask, None), torch.nan)

    def _optimizer(self, weights: list[Tensor]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": self.options.learning_rate, "eps": 1e-7, "weight_decay": 0.0}
        if self.options.optimizer_8bit:
            from bitsandbytes.optim.adamw import AdamW8bit  # pyright: ignore[reportMissingImports]

            return AdamW8bit(weights, **settings)
        return torch.optim.AdamW(weights, fused=True, **settings)

    def _step(self, learning: list[bool]) -> None:
        assert self.adapter is not None
        self.steps += 1
        for row, optimizer in enumerate(self._optimizers):
            if not learning[row]:
                continue
            self._row_steps[row] += 1
            rate = self.options.learning_rate * min(1.0, self._row_steps[row] / max(1, self.options.warmup_steps))
            for weights, gradient in zip(self._row_weights[row], self.adapter.gradients, strict=True):
                weights.grad = gradient[row]
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which `load_state` goes on exactly as this learner would."""
        tensors: dict[str, Tensor] = {}
        if self.adapter is None:
            return tensors, {"rows": None, "steps": self.steps}
        for device, weights in enumerate(self.adapter.weights):
            tensors[f"weights.{device}"] = weights
        numbers: dict[str, int | float] = {}
        for row, index, held in self._optimizer_states():
            for name, value in held.items():
                kept: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
                kept[f"optimizer.{row}.{index}.{name}"] = value
        steps = {"steps": self.steps, "row_steps": self._row_steps}
        return tensors, {"rows": self.adapter.rows, "numbers": numbers, **steps}

    @torch.inference_mode(False)
    def load_state(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        self.steps = data["steps"]
        if data["rows"] is None:
            return
        adapter = self.start(data["rows"])
        self._row_steps = list(data.get("row_steps", [self.steps] * adapter.rows))
        for device, weights in enumerate(adapter.weights):
            weights.copy_(tensors[f"weights.{device}"])
        kept: dict[str, Any] = {**tensors, **data["numbers"]}
        for row, index, held in self._optimizer_states():
            prefix, weights = f"optimizer.{row}.{index}.", self._row_weights[row][index]
            for key, value in kept.items():
                if key.startswith(prefix):
                    if isinstance(value, Tensor):
                        value = value.to(weights.device, copy=True)
                    held[key.removeprefix(prefix)] = value

    def _optimizer_states(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """What the optimiser holds for each row's weights on each device: row, index of the device, numbers by name."""
        for row, optimizer in enumerate(self._optimizers):
            for index, weights in enumerate(self._row_weights[row]):
                yield row, index, optimizer.state[weights]


@contextmanager
def temp_lora(model: Any, options: LearnOptions | None = None, **settings: Any) -> Iterator[Learner]:
    """A temporary adapter that learns while you generate or read with a loop of your own (arXiv 2401.11504)::

        with temp_lora(model, rank=64, learning_rate=5e-5) as learner:
            learner.learn(context_ids, new_ids)  # [rows, c] and [rows, n]
            model(...)  # with what was learned

    Works on any causal language model of transformers, converted by longpatch or not, with adapters of peft or
    quantised. The base weights are never written to. On leaving, however that happens, no adapter is left and
    `requires_grad`, train flags and random generators are as before.

    Args:
        settings: fields of `LearnOptions`.

    Raises:
        LongpatchError: listing everything that is wrong with model and settings; the model is untouched.
    """
    check_model(model)
    learner = Learner(model, make_options(LearnOptions, options, settings))
    with learner.attached():
        yield learner


def _two_dimensional(name: str, ids: Tensor) -> Tensor:
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.is_floating_point():
        raise LongpatchError("learn", [f"{name} has shape {list(ids.shape)} of {ids.dtype}"], "token ids [rows, n]")
    return ids
