"""Convert one model instance, and turn it back."""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from . import attention
from .cache import LambdaCache
from .changes import Changes
from .config import LambdaConfig
from .errors import LongpatchError
from .families import FAMILIES, supported_families, trained_length
from .families.falcon import convert_attention as convert_falcon_attention
from .families.gptj import convert_attention as convert_gptj_attention
from .families.mpt import convert_attention as convert_mpt_attention
from .forward import finish_forward, prepare_cache, prepare_drafts, prepare_forward, prepare_mask, share_as_mask
from .layers import LayerSettings, common_sliding_window, layer_settings
from .recall import Recall
from .recall.search import recalled
from .refusals import refusals
from .rope import ExactRotary, exact_rotary

Model = TypeVar("Model", bound=nn.Module)
ANY = 2**62  # a window where none was given and the model, refused, has none of its own
CODE = {"falcon": convert_falcon_attention, "gptj": convert_gptj_attention, "mpt": convert_mpt_attention}


class Conversion(Changes):
    """What a conversion set up, and how to undo it; found on a converted model as `model.longpatch`."""

    def __init__(self, config: LambdaConfig, layers: tuple[LayerSettings, ...]):
        super().__init__()
        self.config, self.layers = config, layers
        self.rotary: ExactRotary  # phases of the layers that see sinks
        self.alibi_slopes: Tensor | None = None  # [Hq] of a family that has them

    def recalled(self, cache: LambdaCache) -> dict[int, Tensor]:
        """Which tokens each layer recalled in the last forward with `cache`, by the number of the layer.

        Of a `generate` that is the forward of the last token alone.

        `[B, Hq, queries, tokens]`, counted from each row's first token, -1 where nothing was recalled; layers that
        recalled nothing at all are left out. `generate(..., return_dict_in_generate=True)` returns its cache as
        `past_key_values`.

        Raises:
            LongpatchError: if the model does not recall, or `cache` is not that of a forward which did.
        """
        if self.config.recall is None:
            raise LongpatchError("recalled", ["the model was converted without recall"], "convert_model(..., recall=)")
        if not isinstance(cache, LambdaCache):
            reason = f"cache is a {type(cache).__name__}"
            raise LongpatchError("recalled", [reason], "the LambdaCache of a forward with use_cache=True")
        memories = {number: layer.memory for number, layer in enumerate(cache.layers) if layer.memory is not None}
        tokens = {number: recalled(memory) for number, memory in memories.items()}
        return {number: of_layer for number, of_layer in tokens.items() if of_layer is not None}

    def __repr__(self) -> str:
        return f"Conversion({self.config})"


def convert_model(
    model: Model,
    local_branch: int | None = None,
    global_branch: int | None = None,
    *,
    limit_distance: int | None = None,
    slack: int | None = None,
    implementation: str | None = None,
    recall: Recall | Literal[False] | None = None,
) -> Model:
    """Give a causal language model Λ-shaped attention, in place (LM-Infinite, arXiv 2308.16137).

    Afterwards `generate`, `forward`, training and saving work as before, at constant memory and cost per token, and
    at any position. Up to `local_branch` tokens nothing changes. A converted model is converted anew with the new
    settings; `revert_model` undoes it.

    Args:
        model: a model of transformers, or a PeftModel around one.
        local_branch: window in tokens. Default: what the model was saved with, else its `max_position_embeddings`, or
            its `sliding_window` where every layer slides and that is less. A model that mixes sliding and full layers
            keeps its sliding ones as they are.
        global_branch: number of first tokens that stay visible. Default: what the model was saved with, else 10.
        limit_distance: distance in tokens at which they appear; at least `local_branch`. Default: as saved where
            `local_branch` is taken as saved, else `local_branch`.
        slack: tokens beyond the window that the cache can take back exactly, as assisted decoding needs. Default: what
            the model was saved with, else 64.
        implementation: "auto" or a name in `longpatch_kernels.IMPLEMENTATIONS`. Default: as saved, else "auto".
        recall: what of the text that left the window comes back, see `Recall`; False: nothing. Default: as saved, else
            nothing.

    Returns:
        The same instance.

    Raises:
        LongpatchError: listing every reason why the model or a setting cannot be converted; the model is untouched.
    """
    causal = unwrap(model)
    config: Any = getattr(causal, "config", None)
    marker = getattr(config, "longpatch", None) or {}
    if local_branch is None and limit_distance is None:
        limit_distance = marker.get("limit_distance")
    window: int = marker.get("local_branch") or _default_window(config) or limit_distance or ANY
    if local_branch is not None:
        window = local_branch
    if global_branch is None:
        global_branch = int(marker.get("global_branch", 10))
    if slack is None:
        slack = int(marker.get("slack", 64))
    if implementation is None:
        implementation = str(marker.get("implementation", "auto"))
    if recall is None and marker.get("recall"):
        recall = Recall(**marker["recall"])
    reasons = refusals(causal, window, recall)
    wanted = recall if isinstance(recall, Recall) else None
    try:
        settings = LambdaConfig(window, global_branch, limit_distance, slack, implementation, wanted)
    except LongpatchError as error:
        raise LongpatchError("convert_model", reasons + error.reasons, supported_families()) from None
    if reasons:
        raise LongpatchError("convert_model", reasons, supported_families())
    if settings.global_branch > settings.local_branch / 4:
        warnings.warn(
            f"global_branch={settings.global_branch} is more than a quarter of local_branch={settings.local_branch}: "
            "many sinks hurt (LM-Infinite, figure 5)",
            stacklevel=2,
        )
    revert_model(model)
    _convert(causal, settings)
    return model


def convert_llama_model(
    model: Model, local_branch: int | None = None, global_branch: int | None = None, **options
) -> Model:
    """`convert_model` for Llama and everything built like it; see there."""
    return convert_model(model, local_branch, global_branch, **options)


def convert_yi_model(
    model: Model, local_branch: int | None = None, global_branch: int | None = None, **options
) -> Model:
    """`convert_model` for Yi, whose models are Llamas to transformers; see there."""
    return convert_model(model, local_branch, global_branch, **options)


def convert_mpt_model(
    model: Model, local_branch: int | None = None, global_branch: int | None = None, **options
) -> Model:
    """`convert_model` for MPT (ALiBi: sinks appear at `limit_distance`), past `max_seq_len` too; see there."""
    return convert_model(model, local_branch, global_branch, **options)


def convert_gpt_j_model(
    model: Model, local_branch: int | None = None, global_branch: int | None = None, **options
) -> Model:
    """`convert_model` for GPT-J, past `n_positions` too; see there."""
    return convert_model(model, local_branch, global_branch, **options)


def revert_model(model: Model) -> Model:
    """Undo `convert_model`, bit for bit; a model that is not converted stays as it is. Returns the same instance."""
    conversion = getattr(unwrap(model), "longpatch", None)
    if isinstance(conversion, Conversion):
        conversion.undo()
    return model


@contextmanager
def unconverted(model: Any) -> Iterator[None]:
    """Inside the block the model is as it was before conversion; after it, it is converted with the same settings."""
    causal = unwrap(model)
    conversion = getattr(causal, "longpatch", None)
    if not isinstance(conversion, Conversion):
        yield
        return
    conversion.undo()
    try:
        yield
    finally:
        _convert(causal, conversion.config)


def unwrap(model: Any) -> Any:
    """The transformers model inside a PeftModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _default_window(config: Any) -> int | None:
    if getattr(config, "model_type", "") not in FAMILIES:
        return None
    return min(trained_length(config), common_sliding_window(config) or ANY)


def _convert(model: PreTrainedModel, settings: LambdaConfig) -> None:
    base = model.base_model
    conversion = Conversion(settings, layer_settings(model.config, settings))
    AttentionInterface.register(attention.NAME, attention.attend)
    try:
        # Two models may share one config object, so this one gets a copy of its own.
        shared, own = model.config, copy.deepcopy(model.config)
        own.longpatch = settings.to_marker()
        for module in model.modules():
            if vars(module).get("config") is shared:
                conversion.set(module, "config", own)
        convert_attention = CODE.get(own.model_type, _convert_interface)
        conversion.rotary = convert_attention(model, conversion)
        for owner in {id(model): model, id(base): base}.values():
            conversion.set(owner, "longpatch", conversion)
        conversion.hook_after(base, finish_forward)
        if hasattr(model, "_prepare_cache_for_generation"):
            conversion.set(model, "_prepare_cache_for_generation", functools.partial(prepare_cache, model))
            conversion.set(model, "_get_candidate_generator", functools.partial(prepare_drafts, model))
            conversion.set(model, "create_masks_for_generate", prepare_mask)
    except BaseException:
        conversion.undo()
        raise


def _convert_interface(model: PreTrainedModel, conversion: Conversion) -> ExactRotary:
    """Families that call their attention through `AttentionInterface` and hand keyword arguments down to it."""
    base: Any = model.base_model
    model.set_attn_implementation(attention.NAME)
    family = FAMILIES[model.config.model_type]
    module, rotary = exact_rotary(base.rotary_emb, conversion.config.local_branch, family.interleaved)
    conversion.set(base, "rotary_emb", module)
    conversion.hook(base, prepare_forward)
    for layer in base.layers if family.drops_keywords else ():
        conversion.hook(layer, share_as_mask)
    return rotary
