"""A cache as a file, so that reading can go on in another process."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache

from ..cache import LambdaCache
from ..errors import LongpatchError
from ..padding import Padding


def save_cache(cache: Any, path: Path) -> None:
    """Keys, values and counters of a LambdaCache without padding, or a plain DynamicCache, as safetensors."""
    if isinstance(cache, LambdaCache) and cache.padding != Padding():
        raise LongpatchError("save_cache", ["the cache holds padded rows"], "caches of unpadded texts")
    tensors: dict[str, Any] = {}
    counters: dict[str, Any] = {"slid": [getattr(layer, "cumulative_length", None) for layer in cache.layers]}
    for number, layer in enumerate(cache.layers):
        tensors |= {f"{number}.keys": layer.keys.contiguous(), f"{number}.values": layer.values.contiguous()}
        memory: Any = getattr(layer, "memory", None)
        if memory is not None:
            tensors |= {f"{number}.memory.{name}": tensor for name, tensor in memory.state().items()}
    if isinstance(cache, LambdaCache):
        counters = {"length": int(cache.length), "written": int(cache.written)}
    save_file(tensors, path, metadata={"kind": type(cache).__name__, "counters": json.dumps(counters)})


def load_cache(model: Any, path: Path) -> Any:
    """The cache that `save_cache` wrote, for `model` in the state it was in then."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        counters = json.loads(metadata["counters"])
        if metadata["kind"] == "LambdaCache":
            cache: Any = LambdaCache(model.config)
            for name, count in counters.items():
                getattr(cache, name).fill_(count)
        else:
            cache = DynamicCache(config=model.config)
            for layer, count in zip(cache.layers, counters["slid"], strict=True):
                if count is not None:
                    layer.cumulative_length = count
        for number, layer in enumerate(cache.layers):
            keys, values = (file.get_tensor(f"{number}.{name}").to(model.device) for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if getattr(layer, "memory", None) is not None:
                prefix = f"{number}.memory."
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                state = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
                layer.memory.restore(state, model.device)
    return cache
