"""The whole state of one generation: what a checkpoint holds of it, and how a run goes on from there."""

import json
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .checkpoint import cache_state, fingerprint, layer_devices, restore_cache, save_state, with_prefix, without_prefix

KIND = "generation"
COUNTERS = ("learned", "prompt_tokens", "age")
PROMPT_ALONE = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}


def refused_settings(config: GenerationConfig) -> list[str]:
    """A reason for each setting of generate that a run which goes on could not keep to."""
    reasons = [
        f"{name} with checkpoint_dir: a run that goes on cannot tell the prompt from what was written"
        for name, without in PROMPT_ALONE.items()
        if getattr(config, name, None) not in (None, without)
    ]
    for name, value in _plain(config).items():
        try:
            json.dumps(value)
        except TypeError:
            reasons.append(f"{name} with checkpoint_dir: a {type(value).__name__} cannot be written down")
    return reasons


def save_run(run: Any) -> None:
    """Write the state of a `Run` to its folder, if it has one."""
    if run.folder is None:
        return
    tensors, learner = run.learner.state()
    tensors = with_prefix("learner", tensors)
    held, cache = cache_state(run.columns.cache)
    tensors |= with_prefix("cache", held)
    full = run.full_mask(run.text.shape[1])
    tensors |= {
        "text": run.text,
        "mask": torch.ones_like(run.text) if full is None else full,
        "end": run.end,
        "rng": torch.get_rng_state(),
    }
    if run.columns.mask is not None:
        tensors["cache mask"] = run.columns.mask
    if run.text.is_cuda:
        tensors["cuda rng"] = torch.cuda.get_rng_state(run.text.device)
    data = {
        "model": fingerprint(run.causal),
        "options": asdict(run.options),
        "learn_options": run.learner.options.to_dict(),
        "generation_config": _config(run),
        "objects": run.objects,
        "learner": learner,
        "cache": cache,
        "counters": {name: getattr(run, name) for name in COUNTERS},
        "shift": run.columns.shift,
        "elapsed": run.elapsed + time.perf_counter() - run.began,
        "history": run.history,
    }
    save_state(run.folder, KIND, tensors, data)


def restore_run(run: Any, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Put what `save_run` wrote into a run that has been shown the text, and has an empty cache."""
    for name in COUNTERS:
        setattr(run, name, data["counters"][name])
    run.end = tensors["end"].to(run.text.device)
    run.learner.load_state(without_prefix("learner", tensors), data["learner"])
    columns = run.columns
    columns.shift = data["shift"]
    if "cache mask" in tensors:
        columns.mask = tensors["cache mask"].to(run.text.device)
    if data["cache"] is not None:
        devices = layer_devices(run.causal, len(columns.cache.layers))
        restore_cache(columns.cache, without_prefix("cache", tensors), data["cache"], devices)
        length = columns.cache.get_seq_length()
        if columns.shift is None and length:  # generate's own arguments would be those of a run that begins
            columns.shift, columns.mask = 0, run.full_mask(length)
    torch.set_rng_state(tensors["rng"])
    if "cuda rng" in tensors:
        torch.cuda.set_rng_state(tensors["cuda rng"], run.text.device)


def _plain(config: GenerationConfig) -> dict[str, Any]:
    plain = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    if isinstance(plain["sequence_bias"], dict):
        plain["sequence_bias"] = [[list(tokens), bias] for tokens, bias in plain["sequence_bias"].items()]
    return plain


def _config(run: Any) -> dict[str, Any]:
    """Settings for a call that is given the text so far as its prompt: what counts from the prompt is shifted."""
    config, since = run.config, run.text.shape[1] - run.given_tokens
    plain = _plain(config) | {"max_new_tokens": None, "min_new_tokens": None, "num_return_sequences": 1}
    least = config.min_length or 0
    if config.min_new_tokens is not None:
        least = max(least, run.prompt_tokens + config.min_new_tokens)
    plain |= {"min_length": least, "max_time": run.max_time, "token_healing": False}
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        plain["exponential_decay_length_penalty"] = (start - since, factor)
    if since:
        plain["begin_suppress_tokens"] = None
    return plain
