"""Perplexity of one text, streamed through the converted model."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from tqdm import tqdm

from ...evaluation.perplexity import perplexity, stream_nll
from ..flags import MODEL_HELP, add_model_flags, open_converted, positive

EXAMPLES = """\
examples:
  longpatch eval perplexity demo book.txt --local-branch 256
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("text", type=Path, metavar="FILE", help="UTF-8 text to read")
    parser.add_argument("--tokens", type=positive, metavar="N", help="read the first N tokens only (default: all)")
    add_model_flags(parser)


def run(arguments: Namespace) -> None:
    model, tokenizer = open_converted(arguments)
    ids = torch.tensor(tokenizer.encode(arguments.text.read_text(encoding="utf-8")))[: arguments.tokens]
    chunks = tqdm(stream_nll(model, ids), total=-(-(len(ids) - 1) // 512))
    nll = torch.cat([chunk.nll for chunk in chunks])
    print(f"{arguments.text.name}: perplexity {perplexity(nll):.2f} over {len(nll):,} tokens")
