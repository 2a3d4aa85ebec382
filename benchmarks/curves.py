"""Loss curves of training runs, as records and as a figure.

python -m benchmarks.curves docs/figures/cpu-demo.png "ntk=runs/cpu-demo" "theta=runs/cpu-demo-theta" --out FILE.jsonl
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from longpatch.results import record, write_records

COMMAND = "benchmarks.curves"


def losses(folder):
    """[(step, loss in nats)] of a folder that `longpatch train` wrote."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path, metavar="PNG")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL")
    arguments = parser.parse_args()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    records = []
    for run in arguments.runs:
        name, _, folder = run.partition("=")
        curve = losses(folder)
        axes.plot(*zip(*curve, strict=True), label=name)
        records += [record(COMMAND, name, "training_loss", loss, "nat", 1, step=step) for step, loss in curve]
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")
    axes.legend()
    arguments.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.figure, dpi=120)
    write_records(arguments.out, records)


if __name__ == "__main__":
    main()
