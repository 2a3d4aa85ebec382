"""Which linear layers of a model an adapter sits on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import LongpatchError
from .options import LearnOptions

QUERY_NAMES = ("q_proj", "query", "q_lin", "wq", "q")


def check_model(model: Any) -> None:
    """Raises LongpatchError unless `model` is a causal language model of transformers, or peft around one."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(causal, PreTrainedModel) or not isinstance(model, nn.Module):
        raise LongpatchError("temp_lora", [f"model is a {type(model).__name__}, not a model of transformers"])
    if causal.config.is_encoder_decoder or not causal.can_generate():
        raise LongpatchError("temp_lora", [f"{type(causal).__name__} is not a causal language model"])


def find_targets(model: Any, options: LearnOptions) -> dict[str, nn.Module]:
    """Linear layers by name, in the order of the model: those that `options` ask for.

    A layer that peft has wrapped counts as one: the temporary adapter comes on top of the user's own.

    Raises:
        LongpatchError: if nothing matches.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = dict(linear_layers(model, "", output))
    if not linears:
        raise LongpatchError("temp_lora", [f"{type(model).__name__} has no linear layers"])
    wanted = QUERY_NAMES if options.trainable == "queries" else options.target_modules
    if wanted is None:
        return linears
    found = {name: module for name, module in linears.items() if any(_ends(name, end) for end in wanted)}
    missing = [end for end in wanted if not any(_ends(name, end) for name in linears)]
    kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
    if options.trainable == "queries":
        if not found:
            raise LongpatchError("temp_lora", ["trainable='queries': no projection makes queries alone"], kinds)
    elif missing:
        raise LongpatchError("temp_lora", [f"target_modules: no linear layer {name!r}" for name in missing], kinds)
    return found


def features(module: Any) -> tuple[int, int]:
    """Input and output size of a linear layer."""
    inner = getattr(module, "base_layer", module)
    if isinstance(inner, Conv1D):
        return inner.weight.shape[0], inner.weight.shape[1]
    return inner.in_features, inner.out_features


def device_of(module: Any) -> torch.device:
    """Where a layer computes, which is not where its weights rest if accelerate loads them for each forward."""
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    return getattr(module, "base_layer", module).weight.device


def linear_layers(
    module: nn.Module, name: str = "", output: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers inside `module` with their names, but for `output`."""
    wrapped = getattr(module, "base_layer", module)
    if module is output or wrapped is output:
        return
    if isinstance(wrapped, nn.Linear | Conv1D):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from linear_layers(child, f"{name}.{child_name}" if name else child_name, output)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
