"""Low-rank updates of a model's linear layers, one set for each row of a batch, held outside of the model."""

import math
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..errors import LongpatchError
from .options import LearnOptions
from .targets import device_of, features


class Adapter:
    """`output + alpha / rank * up @ down @ input` on each target, by forward hooks: nothing is wrapped or merged.

    All numbers of a device live in one float32 tensor `weights` [rows, P] and their gradients in a second one, of which
    each target's `down` [rows, rank, in] and `up` [rows, out, rank] are views: an optimiser sees one tensor a row.
    Starts as zero change: `down` uniform as in peft, alike for every row, `up` zero.
    """

    def __init__(self, targets: dict[str, nn.Module], options: LearnOptions, rows: int):
        self.rows, self.scale, self.dropout = rows, options.scale, options.dropout
        self.learning, self.enabled = False, True
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._views: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._hooks = []
        generator = torch.Generator().manual_seed(options.seed)
        for device in dict.fromkeys(device_of(module) for module in targets.values()):
            here = [module for module in targets.values() if device_of(module) == device]
            self._allocate(here, device, options.rank, generator)

    def _allocate(self, modules: list[nn.Module], device: torch.device, rank: int, generator: torch.Generator) -> None:
        total = sum(rank * sum(features(module)) for module in modules)
        weights = torch.zeros(self.rows, total, device=device)
        gradients = torch.zeros_like(weights)
        place = 0
        for module in modules:
            inputs, outputs = features(module)
            leaves = []
            for shape in ((rank, inputs), (outputs, rank)):
                span = slice(place, place + math.prod(shape))
                leaf = weights[:, span].unflatten(1, shape).detach().requires_grad_()
                leaf.grad = gradients[:, span].unflatten(1, shape)
                leaves.append(leaf)
                place = span.stop
            bound = inputs**-0.5  # kaiming_uniform_ with a = sqrt(5)
            first = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
            leaves[0].data.copy_(first)
            self._views.append((module, *leaves))
        self.weights.append(weights)
        self.gradients.append(gradients)

    def attach(self) -> None:
        for module, down, up in self._views:
            self._hooks.append(module.register_forward_hook(_Hook(self, down, up)))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def disabled(self):
        """The model as it is without the adapter."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


class _Hook:
    """Forward hook of one target."""

    def __init__(self, adapter: Adapter, down: Tensor, up: Tensor):
        self.adapter, self.down, self.up = adapter, down, up

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        adapter = self.adapter
        if not adapter.enabled:
            return output
        x = inputs[0].to(self.down.dtype)
        if adapter.learning and adapter.dropout:
            x = dropout(x, adapter.dropout)
        if adapter.rows == 1:
            low = linear(x, self.down[0])
            if output.dtype == low.dtype:
                flat = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.up[0].t(), alpha=adapter.scale)
                return flat.view(output.shape)
            change = linear(low, self.up[0])
        else:
            if x.ndim != 3 or len(x) != adapter.rows:
                raise LongpatchError(
                    "temp_lora",
                    [f"a linear layer got {list(x.shape)} where the adapters have {adapter.rows} rows"],
                    f"[{adapter.rows}, tokens, features]: the same rows at each call, kept apart by the model",
                )
            change = (x @ self.down.mT) @ self.up.mT
        return output + (adapter.scale * change).to(output.dtype)
