"""The measurements behind docs/results.md: run the commands, and write the page from what they recorded.

    python -m benchmarks.evaluations list
    python -m benchmarks.evaluations run BOOKS [NAME ...]     into benchmarks/results/evaluations/NAME.jsonl
    python -m benchmarks.evaluations write                    docs/results.md

BOOKS is a folder with five books of PG19's test split: 50031, 50797, 51355, 52654, 5274, as N.txt.
"""

import argparse
import shlex
from pathlib import Path

from benchmarks.measurements import MEASUREMENTS
from benchmarks.page import write_page
from longpatch.cli import main as longpatch

RESULTS = Path(__file__).parent / "results"


def run(books: Path, names: list[str]) -> None:
    """Run what has no results yet, or what is named; an interrupted measurement goes on where it was."""
    for measurement in MEASUREMENTS:
        out = RESULTS / "evaluations" / f"{measurement.name}.jsonl"
        if measurement.records:
            continue  # measured by other programs
        if measurement.name in names or (not names and not out.exists()):
            command = shlex.split(measurement.command.replace("BOOKS", str(books)))
            print(f"{measurement.name}: {measurement.command}", flush=True)
            if longpatch([*command[1:], "--out", str(out), "--resume"]):
                raise SystemExit(f"{measurement.name} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    runner = commands.add_parser("run")
    runner.add_argument("books", type=Path)
    runner.add_argument("names", nargs="*", metavar="NAME")
    commands.add_parser("write")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for measurement in MEASUREMENTS:
            print(f"{measurement.name:<24}{measurement.command}")
    elif arguments.command == "run":
        run(arguments.books, arguments.names)
    else:
        write_page(RESULTS)


if __name__ == "__main__":
    main()
