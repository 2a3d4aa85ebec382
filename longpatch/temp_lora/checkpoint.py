"""A state on disk: one safetensors file that appears whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..cache import LambdaCache
from ..changes import position_config
from ..errors import LongpatchError
from ..padding import Padding
from .targets import device_of, linear_layers

FILE = "state.safetensors"
VERSION = 1


def save_state(folder: Path, kind: str, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Write `tensors` and JSON-able `data`, replacing what was there by one atomic rename; `kind`: a state of what."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    described = json.dumps({"version": VERSION, "kind": kind, "data": data})
    metadata = {"longpatch": described, "checksum": _checksum(described, held)}
    unfinished = folder / f".{FILE}"  # one name: what a killed run leaves is written over by the next
    with open(unfinished, "wb") as file:
        file.write(save(held, metadata))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / FILE)


def load_state(folder: Path, kind: str, call: str = "resume") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote last.

    Raises:
        LongpatchError: if there is no state, or it is damaged, of another kind or version; with the reason.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise LongpatchError(call, [f"no checkpoint {path}"])
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = metadata["longpatch"]
        if metadata["checksum"] != _checksum(described, tensors):
            raise LongpatchError(call, [f"{path} is damaged: its checksum does not fit its contents"])
        stored = json.loads(described)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, LongpatchError):
            raise
        raise LongpatchError(call, [f"{path} is damaged: {error}"]) from error
    if stored["version"] != VERSION:
        raise LongpatchError(call, [f"{path} has format {stored['version']}"], f"format {VERSION}")
    found = stored.get("kind", kind)  # the first states did not say
    if found != kind:
        raise LongpatchError(call, [f"{path} is the state of a {found}"], f"the state of a {kind}")
    return tensors, stored["data"]


def fingerprint(model: Any) -> str:
    """Tells one model from another: conversion, rotary frequencies, sizes and a sample of every parameter."""
    rope = getattr(position_config(model.config), "rope_parameters", None)
    digest = hashlib.sha256(f"{getattr(model, 'longpatch', None)!r} {json.dumps(rope, sort_keys=True)}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            digest.update(_bytes(flat[:: max(1, len(flat) // 256)].cpu().contiguous()))
    return digest.hexdigest()


def cache_state(cache: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Keys and values of a cache, and its counters; entries come from earlier adapters and cannot be recomputed."""
    if cache is None:
        return {}, None
    tensors: dict[str, Tensor] = {}
    counters = []
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized:
            tensors |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
            if getattr(layer, "memory", None) is not None:
                tensors |= with_prefix(f"{index}.memory", layer.memory.state())
        counters.append({name: value for name, value in vars(layer).items() if type(value) is int})
    data: dict[str, Any] = {"counters": counters}
    if isinstance(cache, LambdaCache):
        data |= {"right": cache.padding.right, "length": int(cache.length), "written": int(cache.written)}
        if cache.padding.first_valid is not None:
            tensors["first_valid"] = cache.padding.first_valid
    return tensors, data


def restore_cache(cache: Any, tensors: dict[str, Tensor], data: dict[str, Any], devices: Iterable) -> None:
    """Fill an empty cache of the same kind; `devices` has one device a layer."""
    for index, (layer, device) in enumerate(zip(cache.layers, devices, strict=True)):
        if f"{index}.keys" in tensors:
            keys, values = (tensors[f"{index}.{name}"].to(device) for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if getattr(layer, "memory", None) is not None:
                layer.memory.restore(without_prefix(f"{index}.memory", tensors), device)
        for name, value in data["counters"][index].items():
            setattr(layer, name, value)
    if isinstance(cache, LambdaCache):
        cache.length.fill_(data["length"])
        cache.written.fill_(data["written"])
        cache.padding = Padding(tensors.get("first_valid"), data["right"])


def layer_devices(model: Any, layers: int) -> list[torch.device]:
    """Where each of a model's `layers` computes; all where the model says, if they cannot be told apart."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            first = [next((linear for _, linear in linear_layers(layer)), None) for layer in module]
            return [model.device if linear is None else device_of(linear) for linear in first]
    return [model.device] * layers


def empty_cache(model: Any) -> LambdaCache | DynamicCache:
    """The cache that `model` uses when it is left to itself."""
    return LambdaCache(model.config) if hasattr(model, "longpatch") else DynamicCache(config=model.config)


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _checksum(described: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()
