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


def layer_settings(config: Any, settings: LambdaConfig) -> tuple[LayerSettings, ...]:
    """Settings of every layer of a model with this config.

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
        )
    rotated = FAMILIES[config.model_type].rotated_layers(config)
    return tuple(
        LayerSettings(kept if slides else settings, turns) for slides, turns in zip(sliding, rotated, strict=True)
    )
