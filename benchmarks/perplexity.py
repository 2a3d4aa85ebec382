"""Perplexity of a model on whole texts, unconverted, in fresh windows, and converted, all on the same tokens.

    python -m benchmarks.perplexity demo BOOK.txt ... --arms fresh:256 256,4 256,0
    python -m benchmarks.perplexity demo BOOK.txt ... --tokens 4096 --first 2048 --arms original fresh:256 256,4
    python -m benchmarks.perplexity smollm2 BOOK.txt --tokens 24576 --arms original fresh:8192 8192,10 2048,10 2048,0

Arms: "original" reads everything with a growing cache; "fresh:W" cuts the text into windows of W tokens that start with
BOS and know nothing of each other; "L,G" converts with local_branch L and global_branch G.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from longpatch import convert_model, revert_model
from longpatch.evaluation.perplexity import bits_per_byte, perplexity, stream_nll, window_nll
from longpatch.models import load_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.perplexity"


@dataclass(frozen=True)
class Result:
    """One arm on one text."""

    arm: str
    text: str
    nll: torch.Tensor  # [tokens], nats
    text_bytes: int
    seconds: float

    def __str__(self) -> str:
        values = f"{perplexity(self.nll):>10.2f}{bits_per_byte(self.nll, self.text_bytes):>8.3f} bits/byte"
        return f"{self.text:<16}{self.arm:<14}{values}{self.seconds:>8.0f} s"

    def records(self, arguments) -> list[dict]:
        settings = {"arm": self.arm, "text": self.text, "tokens": arguments.tokens, "first": arguments.first}
        measured = (
            ("perplexity", perplexity(self.nll), "1"),
            ("bits_per_byte", bits_per_byte(self.nll, self.text_bytes), "bit"),
            ("time", self.seconds, "s"),
        )
        return [record(COMMAND, arguments.model, *values, len(self.nll), **settings) for values in measured]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for `longpatch demo`")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 text files")
    parser.add_argument("--arms", nargs="+", required=True, metavar="ARM", help="original, fresh:W or L,G")
    parser.add_argument("--tokens", type=int, metavar="N", help="read the first N tokens only (default: all)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="score only tokens from position N on")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per forward")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="write the results here")
    return parser.parse_args()


def measure(model, ids: torch.Tensor, arm: str, bos: int | None, chunk: int) -> torch.Tensor:
    """NLL of ids[1:] [n - 1] in nats; `ids` start with BOS."""
    if arm.startswith("fresh:"):
        window = int(arm.removeprefix("fresh:"))
        parts = window_nll(model, ids[1:], window, bos, batch=max(1, 4096 // window))
    else:
        if arm != "original":
            local_branch, global_branch = (int(number) for number in arm.split(","))
            convert_model(model, local_branch, global_branch)
        parts = (part.nll for part in stream_nll(model, ids, chunk))
    with tqdm(total=len(ids) - 1, desc=arm, unit="tok", unit_scale=True, mininterval=2) as progress:
        nll = []
        for part in parts:
            nll.append(part)
            progress.update(len(part))
    revert_model(model)
    return torch.cat(nll)


def paired_difference(nll: torch.Tensor, baseline: torch.Tensor, block: int = 512) -> tuple[float, float]:
    """Mean of `nll - baseline` over the same tokens, and its standard error from the means of blocks of tokens."""
    difference = nll - baseline
    blocks = difference[: len(difference) // block * block].view(-1, block).mean(dim=1)
    return difference.mean().item(), (blocks.std() / len(blocks) ** 0.5).item()


def main():
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model)
    bos = tokenizer.bos_token_id
    results = []
    for path in arguments.texts:
        text_ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False))
        ids = torch.cat((text_ids.new_tensor([bos]), text_ids))[: arguments.tokens]
        scored_bytes = len(tokenizer.decode(ids[arguments.first + 1 :], clean_up_tokenization_spaces=False).encode())
        for arm in arguments.arms:
            began = time.perf_counter()
            nll = measure(model, ids, arm, bos, arguments.chunk)[arguments.first :]
            results.append(Result(arm, path.name, nll, scored_bytes, time.perf_counter() - began))
            print(results[-1], flush=True)
    records = [record for result in results for record in result.records(arguments)]
    for arm in arguments.arms:
        of_arm = [result for result in results if result.arm == arm]
        everything = Result(
            arm,
            f"{len(of_arm)} texts",
            torch.cat([result.nll for result in of_arm]),
            sum(result.text_bytes for result in of_arm),
            sum(result.seconds for result in of_arm),
        )
        mean = torch.tensor([perplexity(result.nll) for result in of_arm]).log().mean().exp().item()
        baseline = torch.cat([result.nll for result in results if result.arm == arguments.arms[0]])
        difference, error = paired_difference(everything.nll, baseline)
        print(f"{everything}   geometric mean {mean:.2f}, {difference:+.4f} +- {error:.4f} nats to {arguments.arms[0]}")
        records += everything.records(arguments)
        settings = {"arm": arm, "tokens": arguments.tokens, "first": arguments.first, "baseline": arguments.arms[0]}
        for metric, value, unit, n in (
            ("perplexity_geometric_mean", mean, "1", len(of_arm)),
            ("nll_difference", difference, "nat", len(baseline)),
            ("nll_difference_standard_error", error, "nat", len(baseline)),
        ):
            records.append(record(COMMAND, arguments.model, metric, value, unit, n, **settings))
    if arguments.out:
        write_records(arguments.out, records)


if __name__ == "__main__":
    main()
