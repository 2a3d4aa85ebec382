"""How each layer of one model attends: layers that slide keep their own window."""

from dataclasses import dataclass, replace
from typing import Any

from .config import LambdaConfig
from .families import FAMILIES


@dataclass(frozen=True)
class LayerSettings:
    """One layer: `rotated` tells whether rotary phases are applied to its queries and keys."""

    config: LambdaConfig
    rotated: bool = True


def sliding_layers(config: Any) -> list[bool]:
    """Which layers the model itself limits to its `sliding_window`."""
    if not getattr(config, "sliding_window", None):
        return [False] * config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None)
    if FAMILIES[config.model_type].slides_whole or not layer_types:
        return [True] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in layer_types]


def common_sliding_window(config: Any) -> int | None:
    """The `sliding_window` in tokens where every layer slides."""
    return config.sliding_window if all(sliding_layers(config)) else None


def layer_settings(config: Any, settings: LambdaConfig) -> tuple[LayerSettings, ...]:
    """Settings of every layer of a model with this config.

    Layers that `settings.recall` does not cover have none.

    A model that mixes sliding and full layers keeps its sliding ones: the same window, no sinks. Where every layer
    slides, all are converted.
    """
    sliding = sliding_layers(config)
    kept = settings
    if any(sliding) and not all(sliding):
        kept = replace(
            settings,
            local_branch=config.sliding_window,
            global_branch=0,
            limit_distance=config.sliding_window,
            recall=None,
        )
    covered = [settings.recall is not None and settings.recall.covers(layer) for layer in range(len(sliding))]
    forgetful = replace(settings, recall=None)
    full = [settings if recalls else forgetful for recalls in covered]
    rotated = FAMILIES[config.model_type].rotated_layers(config)
    return tuple(
        LayerSettings(kept if slides else own, turns) for slides, own, turns in zip(sliding, full, rotated, strict=True)
    )
