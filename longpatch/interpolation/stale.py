"""Frequencies that change with the length do not fit keys that were cached with others."""

from typing import Any

from ..errors import LongpatchError

SUPPORTED = "method='ntk' or 'yarn', use_cache=False, convert_model, or one forward over the whole text"


def refuse_stale_keys(base: Any, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the base model.

    Raises:
        LongpatchError: where the cache holds keys whose frequencies are not those of the new length: "dynamic" past
            the original length, "longrope" where the original length is crossed.
    """
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    if not past or getattr(base, "longpatch", None) is not None:
        return
    inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    count = inputs.shape[1] if inputs is not None else args[0].shape[1]
    parameters = base.config.rope_parameters
    parameters = parameters.get("full_attention", parameters)
    original = parameters.get("original_max_position_embeddings", base.config.max_position_embeddings)
    crossed = past <= original or parameters["rope_type"] == "dynamic"
    if past + count > original and crossed:
        reason = (
            f"rope_type {parameters['rope_type']!r} changes its frequencies between {past} and {past + count} tokens "
            "(original length {}), but the cache holds keys with the old ones".format(original)
        )
        raise LongpatchError("forward", [reason], SUPPORTED)
