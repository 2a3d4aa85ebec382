"""Continue a text, shown while it is written. Ctrl-C ends it; what was written stands."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer
from transformers.utils import logging

from ..chat.conversation import READ
from ..chat.sampling import end_tokens
from ..chat.stopping import Stopped, interrupts
from ..data.tokens import Tokens
from ..errors import LongpatchError
from ..temp_lora import TempLoraGenerator
from ..templates import find_template, render
from .flags import (
    MODEL_HELP,
    add_learning_flags,
    add_model_flags,
    add_sampling_flags,
    learn_options,
    open_converted,
    sampling,
)

EXAMPLES = """\
examples:
  longpatch generate demo --prompt "It was a dark and stormy night" --new-tokens 2000
  longpatch generate smollm2 --prompt-file book.txt --local-branch 2048 --out continued.txt
  longpatch generate smollm2 --prompt-file book.txt --temp-lora --learn-tokens 1024 --new-tokens 20000
  longpatch generate smollm2 --prompt "Why is the sky blue?" --chat-template auto
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write prompt and continuation here")
    parser.add_argument("--chat-template", default=None, metavar="NAME|FILE", help="put the prompt as a user's message")
    add_sampling_flags(parser, new_tokens=256)
    add_learning_flags(parser)
    add_model_flags(parser)


def run(arguments: Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings, text = sampling(arguments), prompt_text(arguments)
    if arguments.out and not arguments.out.parent.is_dir():
        raise LongpatchError("generate", [f"--out: no folder {arguments.out.parent}"])
    model, tokenizer = open_converted(arguments)
    torch.manual_seed(arguments.seed)
    tokens = Tokens(tokenizer)
    if arguments.chat_template is None:
        ids, ends = tokens.text(text, last=False), ()
    else:
        template = find_template(tokenizer, arguments.chat_template)
        ids = tokens.plain(render(tokenizer, template, [{"role": "user", "content": text}], prompt=True))
        ends = end_tokens(tokens, template)
    inputs = torch.tensor([ids], device=model.device)
    writer: Any = model
    reading = {"prefill_chunk_size": READ}
    if arguments.temp_lora:
        options = learn_options(arguments)
        reading = {}  # it reads a part at a time by itself
        writer = TempLoraGenerator(
            model,
            chunk_tokens=arguments.learn_tokens,
            learn_prompt=True,
            **{name: getattr(options, name) for name in options.__dataclass_fields__},
        )
    with interrupts() as stop:
        output = writer.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=[Stopped(stop)],
            **settings.arguments(model, tokenizer, ends),
            **reading,
        )
    if arguments.out:
        arguments.out.write_text(tokenizer.decode(output[0], skip_special_tokens=True), encoding="utf-8")


def prompt_text(arguments: Namespace) -> str:
    try:
        text = arguments.prompt if arguments.prompt_file is None else arguments.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LongpatchError("generate", [f"--prompt-file: {error}"], "a UTF-8 text") from error
    if not text:
        raise LongpatchError("generate", ["the prompt is empty"])
    return text
