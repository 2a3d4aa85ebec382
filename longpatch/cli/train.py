"""Teach a model to read further: QLoRA with stretched positions, as a YAML file describes it.

Recipes are in examples/recipes; docs/extending.md describes every entry. The adapter, its checkpoints and the loss of
each logged step (trainer_state.json) go into the folder `output`.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """\
examples:
  longpatch train examples/recipes/cpu-demo.yaml --set data.train=BOOKS_FOLDER
  longpatch train examples/recipes/cpu-demo.yaml --resume
  longpatch train --estimate examples/recipes/llama3-80k.yaml
  accelerate launch --multi_gpu --num_processes 2 -m longpatch.cli train CONFIG.yaml
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="change an entry")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, where there is one")
    parser.add_argument("--estimate", action="store_true", help="only print the peak memory by length")


def run(arguments: Namespace) -> None:
    from ..finetune.config import read_config

    config = read_config(arguments.config, arguments.set)
    if arguments.estimate:
        from ..finetune.estimate import table

        print(table(config))
        return
    from accelerate import PartialState

    from ..finetune.run import train

    output = train(config, arguments.resume)
    PartialState().print(f"adapter: {output}")  # once, however many processes there are
