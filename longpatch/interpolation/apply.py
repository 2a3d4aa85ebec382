"""Changing where a model keeps its positions: rotary modules, GPT-J's table, MPT's ALiBi length."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..changes import Changes, position_config, rebind_config
from ..errors import LongpatchError
from .settings import Interpolation
from .stale import refuse_stale_keys

MARKER = "longpatch_rope"  # in the config; and on the instance, where the changes are remembered
LENGTHS = {"mpt": "max_seq_len", "gptj": "n_positions", "codegen": "n_positions"}
TABLES = ("gptj", "codegen")  # families that keep the sines and cosines of all positions
GPTJ_THETA = 10_000.0


def rotary_modules(model: nn.Module) -> dict[str, Any]:
    """Modules that compute rotary phases of the text decoder's full attention from its own config, by name."""
    config = position_config(model.config)
    return {
        name: module
        for name, module in model.named_modules()
        if "inv_freq" in module._buffers or "full_attention_inv_freq" in module._buffers
        if any(vars(module).get("config") is own for own in (config, model.config))
    }


def reasons_against(model: Any) -> list[str]:
    """Why a model's positions cannot be stretched."""
    if not isinstance(model, PreTrainedModel):
        return [f"model is a {type(model).__name__}, not a model of transformers"]
    config = position_config(model.config)
    if config.model_type in LENGTHS:
        return []
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        return [f"architecture {config.model_type!r} has no rope_parameters, from which frequencies would follow"]
    return []


def apply(model: Any, settings: Interpolation) -> None:
    """Interpolate an unconverted, uninterpolated model; after an error it is as it was."""
    config = position_config(model.config)
    own = copy.deepcopy(model.config)
    changes = Changes()
    length_name = LENGTHS.get(config.model_type, "max_position_embeddings")
    before = {"length": getattr(config, length_name), "rope_parameters": getattr(config, "rope_parameters", None)}
    marker = {"settings": settings.to_marker(), "before": copy.deepcopy(before)}
    try:
        setattr(position_config(own), MARKER, marker)
        setattr(position_config(own), length_name, settings.max_positions)
        rebind_config(model, own, changes)
        if config.model_type == "mpt":
            _extend_alibi(model, settings, changes)
        elif config.model_type in TABLES:
            _replace_tables(model, settings, changes)
        else:
            _set_parameters(model, settings)
            _replace_rotary(model, changes)
            if settings.method in ("dynamic", "longrope"):
                changes.hook(model.base_model, refuse_stale_keys)
        changes.set(model, MARKER, changes)
    except BaseException:
        changes.undo()
        raise


def unapply(model: Any) -> None:
    """Put back what was there: the very modules where this instance was changed, else what the config remembers."""
    changes = vars(model).get(MARKER)
    if isinstance(changes, Changes):
        changes.undo()
        return
    own = copy.deepcopy(model.config)
    config = position_config(own)
    before = getattr(config, MARKER)["before"]
    delattr(config, MARKER)
    setattr(config, LENGTHS.get(config.model_type, "max_position_embeddings"), before["length"])
    rebind_config(model, own, Changes())
    if config.model_type == "mpt":
        _extend_alibi(model, Interpolation.create("none", 1, None, None, before["length"]), Changes())
    elif config.model_type in TABLES:
        _replace_tables(model, Interpolation.create("none", 1, None, None, before["length"]), Changes())
    else:
        config.rope_parameters = before["rope_parameters"]
        _replace_rotary(model, Changes())


def _set_parameters(model: Any, settings: Interpolation) -> None:
    config = position_config(model.config)
    parameters = config.rope_parameters
    modules = rotary_modules(model)
    nested = "rope_type" not in parameters
    # Layers that slide never see far: only those with full attention are interpolated.
    kind = "full_attention" if nested else None
    reasons = [
        f"{name} computes its frequencies from a config of its own"
        for name, module in model.named_modules()
        if "inv_freq" in module._buffers and name not in modules
        if type(vars(module).get("config")) is type(config)
    ]
    if nested and not parameters.get(kind):
        kinds = ", ".join(name for name, value in parameters.items() if value)
        reasons.append(f"{config.model_type} has frequencies for layers of type {kinds} alone")
    elif not modules:
        reasons.append(f"{type(model).__name__} has no rotary module for layers with full attention")
    if reasons:
        raise LongpatchError("interpolate_rope", reasons, "models with one table of frequencies for all such layers")
    current = parameters[kind] if kind else parameters
    if settings.method not in ("none", "ntk") and current["rope_type"] != "default":
        reason = f"method={settings.method!r} on positions that are scaled already (rope_type {current['rope_type']!r})"
        raise LongpatchError("interpolate_rope", [reason], "method 'none' or 'ntk', and theta, for such a model")
    by_length = current["rope_type"] in ("dynamic", "longrope")
    if by_length or (current["rope_type"] != "default" and current.get("factor", 1) is None):
        reason = f"positions that follow the length of the text already (rope_type {current['rope_type']!r})"
        raise LongpatchError("interpolate_rope", [reason], "models whose frequencies do not depend on it")
    frequencies = getattr(next(iter(modules.values())), f"{kind}_inv_freq" if kind else "inv_freq")
    changed = settings.rope_parameters(current, 2 * frequencies.shape[-1])
    config.rope_parameters = parameters | {kind: changed} if kind else changed
    config.validate_rope()


def _replace_rotary(model: Any, changes: Changes) -> None:
    """New rotary modules, of the classes that are there, from the config."""
    for name, module in rotary_modules(model).items():
        parent_name, _, leaf = name.rpartition(".")
        buffer = next(module.buffers())
        with torch.device(buffer.device):
            fresh = type(module)(config=module.config)
        changes.set(model.get_submodule(parent_name), leaf, fresh.train(module.training))


def _replace_tables(model: Any, settings: Interpolation, changes: Changes) -> None:
    rotary_dim = model.config.rotary_dim or model.config.hidden_size
    changes.set(model.base_model, "interpolated", gptj_frequencies(settings, rotary_dim))  # conversion reads this
    for module in model.modules():
        if "embed_positions" in module._buffers:
            table = _table(settings, module.pos_embd_dim).to(module.embed_positions)
            changes.set(module, "embed_positions", table)
            changes.set(module, "max_positions", settings.target_length)


def _table(settings: Interpolation, rotary_dim: int) -> Tensor:
    """sin and cos `[target_length, rotary_dim]`; frequencies that depend on the length are those of `target_length`."""
    frequencies, scaling = gptj_frequencies(settings, rotary_dim)
    angle = torch.outer(torch.arange(settings.target_length).float(), frequencies)
    return torch.cat((angle.sin(), angle.cos()), dim=1) * scaling


def gptj_frequencies(settings: Interpolation, rotary_dim: int) -> tuple[Tensor, float]:
    """`[rotary_dim / 2]` and the scale of cos and sin, by the formulas of transformers for a Llama of that shape."""
    plain = {"rope_type": "default", "rope_theta": GPTJ_THETA}
    config = LlamaConfig(
        head_dim=rotary_dim,
        max_position_embeddings=settings.max_positions,
        rope_parameters=settings.rope_parameters(plain, rotary_dim),
    )
    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.tensor([[settings.target_length - 1]]))
    return rotary.inv_freq, rotary.attention_scaling


def _extend_alibi(model: Any, settings: Interpolation, changes: Changes) -> None:
    if settings.method != "none" or settings.theta is not None:
        reason = "ALiBi has no frequencies to interpolate, only a length"
        raise LongpatchError("interpolate_rope", [reason], "method='none' for MPT")
    for module in model.modules():
        if "max_seq_length" in vars(module):
            changes.set(module, "max_seq_length", settings.target_length)
