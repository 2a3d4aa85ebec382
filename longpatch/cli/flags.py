"""Flags that commands share, and the model they ask for."""

import argparse
from typing import Any

import torch

from longpatch_kernels import IMPLEMENTATIONS

from ..convert import convert_model
from ..models import load_model

MODEL_HELP = "a folder, a hub name, a .gguf file, 'demo' (the small model inside this package) or 'smollm2'"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, how it is loaded and how it is converted."""
    group = parser.add_argument_group("model and conversion")
    group.add_argument("--local-branch", type=int, metavar="L", help="window in tokens (default: the training length)")
    group.add_argument("--global-branch", type=int, metavar="G", help="first tokens that stay visible (default: 10)")
    group.add_argument("--limit-distance", type=int, metavar="D", help="distance at which they appear (default: L)")
    group.add_argument("--attn", choices=("auto", *IMPLEMENTATIONS), default="auto", help="attention implementation")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.add_argument("--seed", type=int, default=0)


def conversion_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `convert_model`."""
    return {
        "local_branch": arguments.local_branch,
        "global_branch": arguments.global_branch,
        "limit_distance": arguments.limit_distance,
        "implementation": arguments.attn,
    }


def open_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The `(model, tokenizer)` that the flags ask for, unconverted."""
    return load_model(arguments.model, getattr(torch, arguments.dtype))


def open_converted(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The same, converted unless `--no-convert` was given."""
    model, tokenizer = open_model(arguments)
    if not getattr(arguments, "no_convert", False):
        convert_model(model, **conversion_settings(arguments))
    return model, tokenizer
