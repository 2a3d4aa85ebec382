"""Does the model use tokens at each distance? Its loss when the context beyond a distance is hidden or shuffled.

Writes a table, JSON lines (--out) and a plot (--plot). A cost above zero says that what lies beyond that distance
lowers the loss; "used" marks a cost of more than two standard errors. Of .jsonl rows of conversations, each is a
window, and its last answer counts.
"""

from argparse import ArgumentParser, Namespace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from ...data.documents import Encoder
from ...data.mixture import parse_parts, read_mixture
from ...errors import LongpatchError
from ...evaluation.distance import WAYS, Effect, answers, distance_losses, doubling, effects, farthest_used, windows
from ...results import record, write_records
from ..flags import MODEL_HELP, add_model_flags, add_template_flag, open_converted, positive

EXAMPLES = """\
examples:
  longpatch eval distance demo BOOK.txt --no-convert --length 1024
  longpatch eval distance runs/cpu-demo BOOK.txt --no-convert --length 1024 --plot distance.png
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("texts", type=Path, nargs="+", metavar="FILE", help="UTF-8 texts, or .jsonl rows")
    parser.add_argument("--length", type=positive, required=True, metavar="N", help="tokens of a window")
    parser.add_argument("--distances", type=positive, nargs="+", metavar="D", help="default: 16, 32, 64, ...")
    parser.add_argument("--scored", type=positive, default=64, metavar="N", help="last tokens of a window that count")
    parser.add_argument("--limit", type=positive, default=64, metavar="N", help="windows in all (default: 64)")
    parser.add_argument("--out", type=Path, metavar="JSONL")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    add_template_flag(parser)
    add_model_flags(parser)


def run(arguments: Namespace) -> None:
    room = arguments.length - arguments.scored
    distances = arguments.distances or doubling(arguments.length, arguments.scored)
    if not distances or max(distances) >= room:
        reason = f"--distances up to {max(distances, default=0)} in windows of {arguments.length}"
        raise LongpatchError("eval distance", [reason], f"less than length - scored = {room}")
    model, tokenizer = open_converted(arguments)
    share = -(-arguments.limit // len(arguments.texts))
    bos = tokenizer.bos_token_id
    cut = []
    for path in arguments.texts:
        if path.suffix == ".jsonl":
            encoder = Encoder(tokenizer, arguments.chat_template)
            rows = answers(map(encoder, read_mixture(parse_parts(str(path)))), bos)
            enough = (row for row in rows if max(distances) < len(row[0]) - row[1] and len(row[0]) <= arguments.length)
            cut += islice(enough, share)
        else:
            ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False))
            cut += [(window, arguments.scored) for window in windows(ids, arguments.length, share)]
    if not cut:
        raise LongpatchError("eval distance", [f"no text has {arguments.length} tokens"])
    losses = []
    for window, scored in tqdm(cut, unit="window", mininterval=5):
        read = distance_losses(model, window, distances, scored, bos, arguments.seed + len(losses))
        losses.append({(way, distance): loss for way, distance, loss in read})
    table = effects(losses)
    print(f"{'beyond':<10}{'distance':>8}{'loss':>10}{'cost':>10}   (nats a token, {len(losses)} windows)")
    print("\n".join(map(str, table)))
    for way in WAYS:
        print(f"{way}: context beyond {farthest_used(table, way)} tokens still lowers the loss (0: none does)")
    if arguments.out:
        settings = {"length": arguments.length, "scored": arguments.scored}
        rows = [
            record("eval distance", arguments.model, metric, value, "nat", e.windows, seed=arguments.seed, **settings)
            | {"settings": settings | {"way": e.way, "distance": e.distance}}
            for e in table
            for metric, value in (("cost", e.cost), ("cost_standard_error", e.error), ("loss", e.loss))
        ]
        write_records(arguments.out, rows)
    if arguments.plot:
        draw(arguments.plot, table, arguments.model)


def draw(path: Path, table: list[Effect], title: str) -> None:
    """Cost in nats a token against distance, with two standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        points = [effect for effect in table if effect.way == way]
        costs, errors = [e.cost for e in points], [2 * e.error for e in points]
        axes.errorbar([e.distance for e in points], costs, yerr=errors, marker="o", capsize=3, label=way)
    axes.axhline(0, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distance in tokens beyond which context is lost")
    axes.set_ylabel("cost, nats a token")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
