"""Stretch a loaded model's positions over a longer text, and take that back."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from ..changes import position_config, unshifted
from ..convert import unconverted, unwrap
from ..errors import LongpatchError
from .apply import MARKER, apply, reasons_against, unapply
from .settings import METHODS, Interpolation

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["MARKER", "METHODS", "Interpolation", "interpolate_rope", "revert_rope"]


def interpolate_rope(
    model: Model,
    *,
    method: str | None = None,
    factor: float | None = None,
    theta: float | None = None,
    target_length: int | None = None,
    original_length: int | None = None,
    long_factor: Sequence[float] | None = None,
) -> Model:
    """Stretch the positions of a model of transformers, or a PeftModel around one, in place.

    A model that is interpolated already is interpolated anew, from what it was before; a converted one stays converted.
    The settings are saved in config.json, and taken up again by what loads a MODEL here. transformers alone applies the
    frequencies, except for GPT-J; `interpolate_rope(model)`, with no argument, then does the rest.

    Args:
        method: "linear", "ntk", "dynamic", "yarn", "longrope", "llama3", or "none": positions extended, nothing
            interpolated. Needs a factor or a target_length. "dynamic" and "longrope" change the frequencies with the
            length, so a forward that would read cached keys with other frequencies raises.
        factor: target length / original length; default: that, rounded up.
        theta: base of the frequencies; alone, it is the way of Llama-3-8B-80K (arXiv 2404.19553): 200e6.
        target_length: tokens to be read; becomes `max_position_embeddings`, except for "dynamic".
        original_length: tokens the model was trained on; default: its `max_position_embeddings`.
        long_factor: "longrope" only, `[rotary_dim / 2]`; default: the divisors of "ntk".

    Returns:
        The same instance.

    Raises:
        LongpatchError: listing every reason; the model is then as it was.
    """
    causal = unwrap(model)
    reasons = reasons_against(causal)
    if reasons:
        raise LongpatchError("interpolate_rope", reasons, "decoders with rotary embeddings, GPT-J, CodeGen, and MPT")
    config = position_config(causal.config)
    marker = getattr(config, MARKER, None) or {}
    if all(value is None for value in (method, factor, theta, target_length, original_length, long_factor)) and marker:
        settings = Interpolation.create(**marker["settings"])
    else:
        before: dict[str, Any] = marker.get("before", {})
        length = original_length or before.get("length") or _length(config)
        settings = Interpolation.create(method, factor, theta, target_length, length, long_factor)
    with unconverted(causal), unshifted(causal):
        revert_rope(causal)
        try:
            apply(causal, settings)
        except Exception as error:
            if marker:
                apply(causal, Interpolation.create(**marker["settings"]))
            if isinstance(error, LongpatchError):
                raise
            # Some families allow few methods, and their configs say so with errors of their own.
            reason = f"{config.model_type} does not take method={settings.method!r}: {' '.join(str(error).split())}"
            raise LongpatchError("interpolate_rope", [reason], "method 'ntk' or 'none', and theta") from error
    return model


def revert_rope(model: Model) -> Model:
    """Undo `interpolate_rope`, bit for bit, also on a model that was saved interpolated. Returns the same instance."""
    causal = unwrap(model)
    if getattr(position_config(getattr(causal, "config", None)), MARKER, None) is not None:
        with unconverted(causal), unshifted(causal):
            unapply(causal)
    return model


def _length(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or config.max_seq_len
