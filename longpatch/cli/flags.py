"""Flags that commands share, and what they ask for: a model, arms, a run."""

import argparse
from pathlib import Path
from typing import Any, Literal

import torch

from longpatch_kernels import IMPLEMENTATIONS

from ..chat.sampling import Sampling
from ..convert import convert_model
from ..errors import LongpatchError
from ..evaluation.arms import SYNTAX, Arm, check_arms, converted_arm, parse_arms
from ..evaluation.run import Run, process_state
from ..interpolation import METHODS, interpolate_rope
from ..models import load_model
from ..recall import Recall
from ..temp_lora import LearnOptions

MODEL_HELP = "a folder, a hub name, a .gguf file, 'demo' (the small model inside this package) or 'smollm2'"
TEMPLATE_HELP = "auto (the tokenizer's where it has one), none, vicuna, llama-2, llama-3, mistral, or a Jinja file"


def positive(text: str) -> int:
    value = int(text.replace(",", "").replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def numbers(text: str) -> list[int]:
    """Positive numbers, separated by commas."""
    return [positive(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """A number of even steps from 0 to 1, or the fractions themselves, separated by commas; 0 is one."""
    if text.isdigit() and text != "0":
        steps = positive(text)
        return [step / max(1, steps - 1) for step in range(steps)]
    return [float(part) for part in text.split(",")]


def recall_settings(text: str) -> Recall | Literal[False]:
    """Settings of `Recall`, as `Recall.parse` reads them; `none` turns a saved one off."""
    try:
        return False if text == "none" else Recall.parse(text)
    except LongpatchError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_model_flags(parser: argparse.ArgumentParser, may_stay: bool = True) -> None:
    """Which model, how it is loaded and how it is converted; `may_stay`: the user may leave it as it is."""
    group = parser.add_argument_group("model and conversion")
    group.add_argument("--local-branch", type=int, metavar="L", help="window in tokens (default: the training length)")
    group.add_argument("--global-branch", type=int, metavar="G", help="first tokens that stay visible (default: 10)")
    group.add_argument("--limit-distance", type=int, metavar="D", help="distance at which they appear (default: L)")
    group.add_argument(
        "--recall",
        type=recall_settings,
        metavar="SETTINGS",
        help="what left the window comes back: 'default', settings of longpatch.Recall (top_k=5,queries=16), or 'none'",
    )
    group.add_argument(
        "--rope-method", choices=METHODS, metavar="NAME", help=f"stretch positions: {', '.join(METHODS)}"
    )
    group.add_argument("--rope-factor", type=float, metavar="X", help="to X times the training length")
    group.add_argument("--rope-theta", type=float, metavar="X", help="another base of the rotary frequencies")
    if may_stay:
        group.add_argument("--no-convert", action="store_true", help="leave the model as it is")
    group.add_argument("--attn", choices=("auto", *IMPLEMENTATIONS), default="auto", help="attention implementation")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.add_argument("--peft", metavar="ADAPTER", help="a LoRA to load on top, folder or hub name")
    group.add_argument("--device-map", metavar="MAP", help="'auto', 'cpu', ... (default: the GPU, else the CPU)")
    group.add_argument("--load-in-4bit", action="store_true", help="quantise to nf4 while loading (bitsandbytes)")
    group.add_argument("--tp", action="store_true", help="tensor parallel over the processes of torchrun")
    group.add_argument("--seed", type=int, default=0)


def conversion_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `convert_model`."""
    return {
        "local_branch": arguments.local_branch,
        "global_branch": arguments.global_branch,
        "limit_distance": arguments.limit_distance,
        "implementation": arguments.attn,
        "recall": arguments.recall,
    }


def rope_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `interpolate_rope`; empty: positions stay as the model has them."""
    given = {name: getattr(arguments, f"rope_{name}") for name in ("method", "factor", "theta")}
    return {name: value for name, value in given.items() if value is not None}


def open_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The `(model, tokenizer)` that the flags ask for, unconverted; on this process's CUDA device, where one is."""
    device_map = arguments.device_map
    if device_map is None and torch.cuda.is_available() and not arguments.tp:
        device_map = {"": process_state().device}
    model, tokenizer = load_model(
        arguments.model,
        getattr(torch, arguments.dtype),
        adapter=arguments.peft,
        device_map=device_map,
        quantization="nf4" if arguments.load_in_4bit else "none",
        tensor_parallel=arguments.tp,
    )
    rope = rope_settings(arguments)
    if rope:
        interpolate_rope(model, **rope)
    return model, tokenizer


def open_converted(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The same, converted unless `--no-convert` was given."""
    model, tokenizer = open_model(arguments)
    if not arguments.no_convert:
        convert_model(model, **conversion_settings(arguments))
    return model, tokenizer


def loading_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What records say about how the model was loaded: the flags that were given."""
    given = {"dtype": arguments.dtype, "peft": arguments.peft, "load_in_4bit": arguments.load_in_4bit}
    usual = ("float32", None, False)
    rope = {f"rope_{name}": value for name, value in rope_settings(arguments).items()}
    return {name: value for name, value in given.items() if value not in usual} | rope


def add_run_flags(parser: argparse.ArgumentParser, baselines: str = SYNTAX) -> None:
    """Which arms, how many samples, and where the records go."""
    group = parser.add_argument_group("arms and records")
    group.add_argument(
        "--baseline", default="", metavar="ARM,...", help=f"also measure on the same samples: {baselines}"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="measure the first N samples only")
    group.add_argument("--out", type=Path, metavar="JSONL", help="write the records here")
    group.add_argument("--resume", action="store_true", help="go on with the unfinished run that --out names")


def add_template_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat-template", default="auto", metavar="NAME|FILE|none", help=TEMPLATE_HELP)


def add_sampling_flags(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    """How text is written."""
    group = parser.add_argument_group("writing")
    group.add_argument("--new-tokens", type=positive, default=new_tokens, metavar="N", help=f"default: {new_tokens}")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest share P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")


def sampling(arguments: argparse.Namespace) -> Sampling:
    return Sampling(arguments.new_tokens, arguments.temperature, arguments.top_p, arguments.repetition_penalty)


def add_learning_flags(parser: argparse.ArgumentParser) -> None:
    """A temporary adapter that learns while text is written."""
    group = parser.add_argument_group("temporary adapter (Temp-LoRA)")
    group.add_argument("--temp-lora", action="store_true", help="learn from the text while it lasts")
    group.add_argument("--learn-tokens", type=positive, default=256, metavar="N", help="tokens learned at a time")
    group.add_argument("--learning-rate", type=float, default=5e-5, metavar="X")
    group.add_argument("--rank", type=positive, default=64, metavar="R")
    group.add_argument("--epochs", type=positive, default=2, metavar="N", help="steps on each part")


def learn_options(arguments: argparse.Namespace) -> LearnOptions:
    return LearnOptions(
        rank=arguments.rank,
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        seed=arguments.seed,
    )


def open_arms(arguments: argparse.Namespace, model, kinds: tuple[str, ...], call: str) -> list[Arm]:
    """The model as the flags ask for it, then the baselines.

    Raises:
        LongpatchError: for arms that are none, or none of this evaluation's `kinds`; for `--tp`.
    """
    if arguments.tp:
        reason = "--tp: several processes share out the samples, and a split model needs all of them for each"
        raise LongpatchError(call, [reason], "--device-map auto")
    settings = conversion_settings(arguments)
    first = Arm("original") if arguments.no_convert else converted_arm(model, settings)
    arms = [first, *parse_arms(arguments.baseline, {"implementation": arguments.attn})]
    check_arms(arms, kinds, call)
    return arms


def open_run(arguments: argparse.Namespace, command: str, **settings: Any) -> Run:
    """The run that the flags ask for; `settings` are those that all its records share."""
    elsewhere = ("out", "resume", "plot", "smooth", "save_every", "run", "prog")
    return Run(
        command,
        arguments.model,
        loading_settings(arguments) | settings,
        arguments.seed,
        arguments.out,
        arguments.resume,
        {name: str(value) for name, value in vars(arguments).items() if name not in elsewhere},
    )
