"""What happens once before each forward of a converted model, and before each `generate`."""

import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache import LambdaCache
from .config import LambdaConfig
from .errors import LongpatchError
from .padding import Padding, read_padding
from .step import Step

SUPPORTED = (
    "past_key_values: LambdaCache, DynamicCache without sliding layers and without recall (it grows), or none; "
    "attention_mask: [batch, tokens], 1 = token, or none; output_attentions=False"
)


@functools.cache
def _parameter_names(model_class: type) -> tuple[str, ...]:
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def prepare_forward(base: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the base model: everything that layers share is computed here, once.

    Reads padding, positions and cache; makes a LambdaCache where one is wanted and none was passed; hands a `Step` to
    all layers as the keyword `longpatch`, which transformers passes through to the attention function.
    """
    if args:
        kwargs = {**dict(zip(_parameter_names(type(base)), args, strict=False)), **kwargs}
    inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if inputs is None:
        return (), kwargs  # the model's own error says it best
    config = base.config
    conversion, cache, mask = base.longpatch, kwargs.get("past_key_values"), kwargs.get("attention_mask")
    refuse_unusable(conversion.config, cache, mask, kwargs.get("output_attentions") or config.output_attentions)
    if cache is None and _wants_cache(base, kwargs.get("use_cache")):
        cache = kwargs["past_key_values"] = LambdaCache(config)
    own_cache = cache if isinstance(cache, LambdaCache) else None

    count = inputs.shape[1]
    positions = kwargs.get("position_ids")
    past, written, short, padding = 0, 0, False, None
    if own_cache is not None:
        short = conversion.alibi_slopes is None and own_cache.reads_shortly(count)
        past, written = own_cache.counts(short)
        padding = own_cache.padding
    elif cache is not None:
        past = cache.get_seq_length()
    if not isinstance(past, Tensor):  # a compiled decode step takes the padding as it finds it
        if padding is None and past:
            padding = read_padding(mask, None, Padding(), 0, past + count)
        else:
            padding = read_padding(mask, positions, padding or Padding(), past, count)
    assert padding is not None
    first_valid = padding.first_valid
    recall = conversion.config.recall
    if padding.right and recall is not None and recall.queries is not None:
        raise LongpatchError(
            "forward", ["right padding: the last queries of a row, which recall, are padding"], "Recall(queries=None)"
        )
    if positions is None:
        positions = (torch.arange(count, device=inputs.device) + past)[None]
    sinks_cached, decodes, rotary = False, None, conversion.rotary
    if own_cache is not None:
        sinks_cached = own_cache.has_sinks(past)
        if short:
            decodes = own_cache.decodes(rotary, positions, past, written, first_valid)
    step = Step.create(
        conversion.config, conversion.layers, rotary, positions, past, first_valid, sinks_cached, written, decodes
    )
    if own_cache is not None:
        own_cache.begin(step, padding)
    kwargs |= {"position_ids": positions, "attention_mask": None, "longpatch": (step, own_cache)}
    return (), kwargs


def finish_forward(base: Any, args: tuple, kwargs: dict, output: Any) -> None:
    """Forward hook of the base model: the tokens that were read now count."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, LambdaCache):
        cache.end()


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


def refuse_unusable(settings: LambdaConfig, cache: Cache | None, mask: Any, output_attentions: bool) -> None:
    """Raises LongpatchError with every reason against these arguments; warns of a cache that grows."""
    reasons = [] if cache is None else _cache_reasons(settings, cache)
    if mask is not None and getattr(mask, "ndim", None) != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        reasons.append(f"attention_mask has shape {shape}")
    if output_attentions:
        reasons.append("output_attentions=True: Λ-attention never forms the matrix of weights")
    if reasons:
        raise LongpatchError("forward", reasons, SUPPORTED)
    if cache is not None and not isinstance(cache, LambdaCache):
        warnings.warn(
            "past_key_values is a DynamicCache, which grows with the text; for constant memory leave it out, or pass "
            "LambdaCache(model.config)",
            stacklevel=2,
        )


def _cache_reasons(settings: LambdaConfig, cache: Cache) -> list[str]:
    if isinstance(cache, LambdaCache):
        differ = cache.config != settings
        made = f"past_key_values was made for other settings: the cache has {cache.config}, the model {settings}"
        return [made] if differ else []
    if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
        return [] if settings.recall is None else ["past_key_values is a DynamicCache: recall needs a memory"]
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    return [f"past_key_values is a {type(cache).__name__}" + (f" of {', '.join(sorted(kinds))}" if kinds else "")]


def prepare_cache(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length) -> None:
    """Instance override of `_prepare_cache_for_generation`: `generate` gets a LambdaCache by itself."""
    implementation = generation_config.cache_implementation
    given = model_kwargs.get("past_key_values")
    if implementation not in (None, "dynamic", "offloaded", "static"):
        raise LongpatchError(
            "generate", [f"cache_implementation={implementation!r}"], "None (a LambdaCache), 'static' or 'offloaded'"
        )
    if given is None and generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = LambdaCache(
            model.config, offloading=implementation == "offloaded", static=implementation == "static"
        )
    else:
        type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def prepare_drafts(model: Any, **kwargs: Any) -> Any:
    """Instance override of `_get_candidate_generator`: drafts that could change the text are refused.

    The cache takes back no more than `slack` tokens. A recall of the last queries alone would be another in the forward
    that verifies several tokens than in the forward of each.

    Raises:
        LongpatchError: before the model has read anything.
    """
    config, reasons = model.longpatch.config, []
    slack = config.slack
    draft, assistant = kwargs["generation_config"].prompt_lookup_num_tokens, kwargs.get("assistant_model")
    if assistant is not None:
        draft, schedule = (
            getattr(assistant.generation_config, name)
            for name in ("num_assistant_tokens", "num_assistant_tokens_schedule")
        )
        if schedule in ("heuristic", "heuristic_transient"):
            reasons.append(f"num_assistant_tokens_schedule={schedule!r} lets drafts grow without bound")
    if draft is not None and draft > slack:
        reasons.append(f"drafts of {draft} tokens are more than the cache can take back (slack={slack})")
    if config.recall is not None and config.recall.queries is not None:
        reasons.append(f"drafts with recall.queries={config.recall.queries}: not every token that is verified recalls")
    if reasons:
        supported = (
            f"num_assistant_tokens or prompt_lookup_num_tokens up to {slack}, constant, or a larger slack; "
            "no recall, or Recall(queries=None)"
        )
        raise LongpatchError("generate", reasons, supported)
    return type(model)._get_candidate_generator(model, **kwargs)


def prepare_mask(config, inputs_embeds, attention_mask, *args, is_first_iteration=False, **kwargs) -> Tensor | None:
    """Instance override of `create_masks_for_generate`, which `generate` calls for static caches.

    The mask of the prompt goes through as it is; afterwards the cache remembers the padding, and a mask that grows by a
    column each step would make every step's shapes its own.
    """
    return attention_mask if is_first_iteration or inputs_embeds.shape[1] > 1 else None
