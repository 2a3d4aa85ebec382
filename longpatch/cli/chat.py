"""Talk with a model in the terminal, for as long as you like: the text so far is kept, and read once.

A chat model's own template is used; a model without one continues what you write. /help lists what can be typed.
"""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext

import torch
from transformers.utils import logging

from ..chat import Conversation
from ..chat.terminal import HELP
from ..chat.terminal import run as talk
from ..temp_lora import temp_lora
from .flags import (
    MODEL_HELP,
    add_learning_flags,
    add_model_flags,
    add_sampling_flags,
    add_template_flag,
    learn_options,
    open_converted,
    sampling,
)

EXAMPLES = f"""\
examples:
  longpatch chat smollm2 --local-branch 2048 --temperature 0.2 --top-p 0.9
  longpatch chat smollm2 --temp-lora --learning-rate 5e-4    it learns from the conversation while it lasts
  longpatch chat smollm2 < messages.txt                      each line is a message

in the conversation:
{HELP}
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add_template_flag(parser)
    add_sampling_flags(parser, new_tokens=512)
    add_learning_flags(parser)
    add_model_flags(parser)


def run(arguments: Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = sampling(arguments)
    model, tokenizer = open_converted(arguments)
    torch.manual_seed(arguments.seed)
    learning = temp_lora(model, learn_options(arguments)) if arguments.temp_lora else nullcontext()
    with learning as learner:
        conversation = Conversation(
            model,
            tokenizer,
            arguments.chat_template,
            settings,
            learner,
            arguments.learn_tokens,
            arguments.system,
        )
        talk(conversation)
