"""Why a model cannot be converted as asked."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families import FAMILIES, reasons_against
from .layers import common_sliding_window, sliding_layers
from .recall import Recall


def refusals(model: nn.Module, local_branch: Any, recall: Any) -> list[str]:
    """Every reason that lies in the model; empty if there is none."""
    if not isinstance(model, PreTrainedModel):
        return [f"model is a {type(model).__name__}, not a model of transformers"]
    reasons = reasons_against(model.config)
    unloaded = [
        name for name, module in model.named_modules() if _has_meta_parameters(module) and not _is_offloaded(module)
    ]
    if unloaded:
        reasons.append(f"parameters on the meta device that nothing loads, in {', '.join(unloaded[:3])}, ...")
    if model.config.model_type in FAMILIES:
        reasons += _sliding_reasons(model.config, local_branch) + _recall_reasons(model.config, recall)
    return reasons


def _has_meta_parameters(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def _is_offloaded(module: Any) -> bool:
    """Whether a hook of accelerate fetches the module's parameters for each forward."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def _sliding_reasons(config: Any, local_branch: Any) -> list[str]:
    slides = common_sliding_window(config)
    if slides is None or not isinstance(local_branch, int) or local_branch <= slides:
        return []
    return [f"local_branch={local_branch} is more than the sliding window that every layer was trained with, {slides}"]


def _recall_reasons(config: Any, recall: Any) -> list[str]:
    if recall is None or recall is False:
        return []
    if not isinstance(recall, Recall):
        return [f"recall={recall!r} must be a Recall, False or None"]
    reasons, sliding = [], sliding_layers(config)
    if recall.folder is not None and not Path(recall.folder).is_dir():
        reasons.append(f"recall.folder={recall.folder!r} is no folder")
    mixed = any(sliding) and not all(sliding)
    if not any(recall.covers(layer) and not (mixed and slides) for layer, slides in enumerate(sliding)):
        covered = f"recall from layer {recall.from_layer} to {recall.to_layer} covers none of the model's"
        never = ", of which those that stay sliding never recall" if mixed else ""
        reasons.append(f"{covered} {len(sliding)} layers{never}")
    return reasons
