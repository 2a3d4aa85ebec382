"""Changes to one model instance that can be taken back."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Missing:
    """What is remembered of an attribute that was not there; a class, so that copies know it again."""


class Changes:
    """Attributes set and hooks added on modules; `undo` puts everything back, in reverse.

    Plain data and module-level functions, so that `deepcopy` and `pickle` of the model carry it along.
    """

    def __init__(self):
        self._changes: list[tuple[Any, str, Any]] = []
        self._hooks = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, a submodule or a buffer, remembering what was there."""
        before = vars(owner).get(name, Missing)
        if isinstance(owner, nn.Module):
            for kind in (owner._modules, owner._buffers):
                before = kind.get(name, before)
        self._changes.append((owner, name, before))
        setattr(owner, name, value)

    def hook(self, module: nn.Module, function) -> None:
        """Add a forward pre-hook that takes and returns positional and keyword arguments."""
        self._hooks.append(module.register_forward_pre_hook(function, with_kwargs=True))

    def hook_after(self, module: nn.Module, function) -> None:
        """Add a forward hook that takes positional and keyword arguments and the output, and returns an output."""
        self._hooks.append(module.register_forward_hook(function, with_kwargs=True))

    def replace_forward(self, module: nn.Module, function: Callable, *args: Any) -> None:
        """Replace a module's innermost forward by `function(module, *args, ...)`, a function of some file's top level.

        So it survives deepcopy and pickle, and hooks of accelerate around the forward stay in place.
        """
        slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self.set(module, slot, functools.partial(function, module, *args))

    def undo(self) -> None:
        for handle in self._hooks:
            handle.remove()
        for owner, name, value in reversed(self._changes):
            if value is Missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._changes, self._hooks = [], []


SHIFTED = "longpatch_shifted"  # on the instance: its shifted attention, which can be taken back and done again


@contextmanager
def unshifted(model: nn.Module) -> Iterator[None]:
    """Inside the block the model attends as before `shift_attention`; after it, shifted again: nothing crosses it."""
    shift = vars(model).get(SHIFTED)
    if shift is None:
        yield
        return
    shift.undo()
    try:
        yield
    finally:
        shift.redo()


def position_config(config: Any) -> Any:
    """The part of a config that describes the text decoder."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def rebind_config(model: nn.Module, own: Any, changes: Changes) -> None:
    """Let every module that refers to the model's config refer to `own`: two models may share one config object."""
    shared: Any = model.config
    replaced = {id(shared): own, id(position_config(shared)): position_config(own)}
    for module in model.modules():
        config = replaced.get(id(vars(module).get("config")))
        if config is not None:
            changes.set(module, "config", config)
