"""Let a language model behind an OpenAI-compatible endpoint ask and answer about long texts.

Kinds: "detail", one detail in one text; "details", many over several; "life", a person's life through a book. The
model sees excerpts, the rows {messages} hold the whole text. First prints what it will cost; --yes sends.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tqdm import tqdm

from ...endpoint import Endpoint
from ...errors import LongpatchError
from ...synthesis.files import CALL, read_texts
from ...synthesis.questions import PROMPTS, Asking, make_jobs
from ...synthesis.requests import cost, finished, send
from ..flags import positive

EXAMPLES = """\
examples:
  longpatch synthesize endpoint BOOKS rows.jsonl --endpoint http://localhost:8000/v1 --name MODEL
  longpatch synthesize endpoint BOOKS rows.jsonl --endpoint URL --name MODEL --key-file KEY --per-minute 60 --yes
  longpatch synthesize endpoint BOOKS rows.jsonl --endpoint URL --name MODEL --yes --resume
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="TEXT", help=".txt files, {text} rows or folders")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="as in http://localhost:8000/v1")
    parser.add_argument("--name", required=True, metavar="MODEL", help="as the endpoint knows it")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="holds the endpoint's key")
    parser.add_argument("--kinds", default=",".join(PROMPTS), metavar="KIND,...", help=f"of {', '.join(PROMPTS)}")
    asking = Asking()
    for name, what in (
        ("length", "tokens of a row's text"),
        ("segment", "tokens of an excerpt"),
        ("segments", "excerpts of a request"),
        ("questions", "of a request"),
        ("texts-a-row", "texts that 'details' brings together"),
    ):
        default = asking.texts if name == "texts-a-row" else getattr(asking, name)
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"{what} ({default:,})")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N requests only")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of a reply (default: as the endpoint has it)")
    parser.add_argument("--per-minute", type=positive, metavar="N", help="requests at most")
    parser.add_argument("--parallel", type=positive, default=4, metavar="N", help="requests at one time (4)")
    parser.add_argument("--retries", type=int, default=5, metavar="N", help="of a request that fails (5)")
    parser.add_argument("--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that OUT.jsonl lacks")
    parser.add_argument("--yes", action="store_true", help="send; without it only the cost is printed")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: Namespace) -> None:
    asking = Asking(
        tuple(arguments.kinds.split(",")),
        arguments.length,
        arguments.segment,
        arguments.segments,
        arguments.questions,
        arguments.texts_a_row,
        arguments.seed,
    )
    if arguments.out.exists() and not arguments.resume:
        raise LongpatchError(CALL, [f"{arguments.out} exists"], "--resume, or a new file")
    done = finished(arguments.out)
    jobs = list(make_jobs(read_texts(arguments.texts), asking))[: arguments.limit]
    jobs = [job for job in jobs if job.name not in done]
    estimate = cost(jobs)
    print(estimate, f"; {len(done):,} rows are there" if done else "", sep="")
    if arguments.prices:
        print(f"at these prices: {estimate.price(*arguments.prices):.2f}")
    if not arguments.yes:
        print("nothing was sent; --yes sends")
        return
    endpoint = Endpoint(
        arguments.endpoint,
        arguments.name,
        _key(arguments.key_file),
        retries=arguments.retries,
        per_minute=arguments.per_minute,
        max_tokens=arguments.max_tokens,
    )
    failures = []
    for failure in tqdm(send(jobs, endpoint, arguments.out, arguments.parallel), total=len(jobs), unit="row"):
        if failure:
            failures.append(failure)
            tqdm.write(failure)
    print(
        f"{len(jobs) - len(failures):,} rows more in {arguments.out}, {len(failures):,} failed (--resume tries again)"
    )


def _key(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LongpatchError(CALL, [f"--key-file {path}: {error}"]) from error
