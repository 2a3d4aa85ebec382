"""What happens once before each forward of a converted model, and before each `generate`."""

import functools
import inspect
import warnings
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache import LambdaCache
from .errors import LongpatchError
from .padding import Padding, read_padding
from .step import Step

SUPPORTED_CACHES = "LambdaCache, DynamicCache without sliding layers (it grows), or none"


@functools.cache
def _parameter_names(model_class: type) -> tuple[str, ...]:
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def prepare_forward(base: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the base model: everything that layers share is computed here, once.

    Reads padding, positions and cache; makes a LambdaCache where one is wanted and none was passed; hands a `Step` to
    all layers as the keyword `longpatch`, which transformers passes through to the attention function.
    """
    kwargs = {**dict(zip(_parameter_names(type(base)), args, strict=False)), **kwargs}
    inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if inputs is None:
        return (), kwargs  # the model's own error says it best
    if kwargs.get("output_attentions") or getattr(base.config, "output_attentions", False):
        raise LongpatchError("forward", ["output_attentions=True: Λ-attention never forms the matrix of weights"])
    cache = kwargs.get("past_key_values")
    config = base.longpatch.config
    check_cache(cache, base)
    if cache is None and _wants_cache(base, kwargs.get("use_cache")):
        cache = kwargs["past_key_values"] = LambdaCache(base.config)
    own_cache = cache if isinstance(cache, LambdaCache) else None

    count = inputs.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if own_cache is not None or not past:
        known = Padding() if own_cache is None else own_cache.padding
        padding = read_padding(mask, positions, known, past, count)
    else:
        padding = read_padding(mask, None, Padding(), 0, past + count)
    if positions is None:
        positions = torch.arange(past, past + count, device=inputs.device)[None]
    sinks_cached = own_cache is not None and own_cache.has_sinks()
    conversion = base.longpatch
    step = Step.create(config, conversion.layers, conversion.rotary, positions, past, padding.first_valid, sinks_cached)
    if own_cache is not None:
        own_cache.begin(step, padding)
    kwargs |= {"position_ids": positions, "attention_mask": None, "longpatch": (step, own_cache)}
    return (), kwargs


def share_as_mask(layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of layers that drop unknown keyword arguments but hand their mask down."""
    return args, kwargs | {"attention_mask": kwargs.get("longpatch")}


def share_as_positions(base: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of base models that drop unknown keyword arguments but hand `position_ids` down untouched.

    Their attention gets phases and what layers share, `(phase, (step, cache))`, in place of the ids.
    """
    shared = kwargs.pop("longpatch", None)
    if shared is not None:
        rotary = base.longpatch.rotary
        phase = rotary.phase(kwargs["position_ids"]).scaled(rotary.attention_scaling)
        kwargs |= {"position_ids": (phase, shared), "attention_mask": no_mask()}
    return args, kwargs


def no_mask() -> torch.Tensor:
    """A mask of four dimensions is taken as it is: so transformers builds none of n x n."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool)


def _wants_cache(base: Any, use_cache: bool | None) -> bool:
    if base.training and getattr(base, "gradient_checkpointing", False):
        return False
    return base.config.use_cache if use_cache is None else use_cache


def check_cache(cache: Cache | None, base: Any) -> None:
    """Raises LongpatchError for a cache that Λ-attention cannot use; warns of one that grows."""
    if cache is None:
        return
    if isinstance(cache, LambdaCache):
        if cache.config != base.longpatch.config:
            settings = f"the cache has {cache.config}, the model {base.longpatch.config}"
            raise LongpatchError(
                "forward", [f"past_key_values was made for other settings: {settings}"], SUPPORTED_CACHES
            )
        return
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain:
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
        described = type(cache).__name__ + (f" of {', '.join(sorted(kinds))}" if kinds else "")
        raise LongpatchError("forward", [f"past_key_values is a {described}"], SUPPORTED_CACHES)
    warnings.warn(
        "past_key_values is a DynamicCache, which grows with the text; for constant memory leave it out, or pass "
        "LambdaCache(model.config)",
        stacklevel=2,
    )


def prepare_cache(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length) -> None:
    """Instance override of `_prepare_cache_for_generation`: `generate` gets a LambdaCache by itself."""
    implementation = generation_config.cache_implementation
    given = model_kwargs.get("past_key_values")
    if implementation not in (None, "dynamic", "offloaded"):
        raise LongpatchError(
            "generate", [f"cache_implementation={implementation!r}"], "None (a LambdaCache) or 'offloaded'"
        )
    if given is None and generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = LambdaCache(model.config, offloading=implementation == "offloaded")
    else:
        type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
