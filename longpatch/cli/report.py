"""Tables, plots and comparisons of recorded results.

Records of samples are pooled into means with 95 % intervals (bootstrap over samples); where several arms or files hold
the same samples, their differences to the first are given with intervals too.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import LongpatchError
from ..report.plot import draw
from ..report.summary import summarise
from ..report.table import tables
from ..results import read_records
from .flags import positive

EXAMPLES = """\
examples:
  longpatch report results/passkey.jsonl --plot passkey.png
  longpatch report before.jsonl after.jsonl --metric perplexity
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="JSON lines that --out wrote")
    parser.add_argument("--metric", action="append", default=[], help="only metrics whose name holds this")
    parser.add_argument("--no-intervals", action="store_true", help="leave the intervals out of the tables")
    parser.add_argument("--counts", action="store_true", help="say over how many observations each mean is")
    parser.add_argument("--plot", type=Path, metavar="PNG|SVG", help="draw them too")
    parser.add_argument(
        "--smooth", "--smoothing", type=positive, default=1, metavar="N", help="average curves over N points"
    )
    parser.add_argument("--out", type=Path, metavar="MD", help="write the tables here instead of printing them")


def run(arguments: Namespace) -> None:
    missing = [f"no file {path}" for path in arguments.results if not path.is_file()]
    if missing:
        raise LongpatchError("report", missing)
    records, names = [], {}
    for path in arguments.results:
        for record in read_records(path):
            records.append(record)
            names[id(record)] = path.stem
    rows = summarise(records, names)
    rows = [row for row in rows if not arguments.metric or any(part in row.metric for part in arguments.metric)]
    if not rows:
        raise LongpatchError("report", ["no records of such a metric"])
    text = tables(rows, not arguments.no_intervals, arguments.counts)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if arguments.plot:
        draw(arguments.plot, rows, arguments.smooth)
