"""A model's state that learning has to change for a while, and its restoration."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_MISSING = object()
_FLAGS = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def frozen(model: nn.Module):
    """No parameter takes gradients; afterwards those that did do again, whatever happened."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module, checkpointing: bool = False):
    """The model's own dropout is off, and activations are computed twice if `checkpointing`; flags are put back."""
    before = [(module, {name: vars(module).get(name, _MISSING) for name in _FLAGS}) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
            if isinstance(module, GradientCheckpointingLayer):
                # The layer asks for its own flag alone; the modules inside it stay in eval mode.
                module.training = module.gradient_checkpointing = checkpointing
                vars(module)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
        yield
    finally:
        for module, flags in before:
            for name, value in flags.items():
                if value is _MISSING:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value


@contextmanager
def own_randomness(seed: int, devices: list[torch.device]):
    """Random numbers on `devices` and the CPU from `seed`; afterwards generators go on as if nothing had been drawn."""
    generators = [torch.default_generator, *(_generator(device) for device in devices if device.type != "cpu")]
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]
