"""Perplexity of whole texts in sliding windows, of a model and of what training made of it.

    python -m benchmarks.extension demo BOOK... --windows 256 512 1024
    python -m benchmarks.extension runs/cpu-demo BOOK... --windows 256 1024

Each window starts with BOS. It moves by `--stride` of its length (default: half), and only tokens that no earlier
window has scored are scored, so that each token is, once. A stride of 1 cuts the text into fresh windows.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from longpatch.evaluation.perplexity import perplexity
from longpatch.models import load_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.extension"
BATCH_TOKENS = 8192


@torch.no_grad()
def sliding_nll(model, ids, window, stride, bos, progress=None):
    """NLL [n] in nats of `ids` [n], each with at least `window - stride` tokens before it where the text has them."""
    starts = range(0, max(1, len(ids) - (window - 1) + stride), stride)
    parts, scored = [], 0
    jobs = []
    for start in starts:
        stop = min(start + window - 1, len(ids))
        if stop > scored:
            jobs.append((start, stop, scored))
            scored = stop
    batch = max(1, BATCH_TOKENS // window)
    full = [job for job in jobs if job[1] - job[0] == window - 1]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)] + [[job] for job in jobs[len(full) :]]
    for group in groups:
        rows = torch.stack([torch.cat((ids.new_tensor([bos]), ids[start:stop])) for start, stop, _ in group])
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        for (start, _, first), row_logits, row in zip(group, logits, rows, strict=True):
            parts.append(cross_entropy(row_logits[first - start :].float(), row[1 + first - start :], reduction="none"))
            if progress is not None:
                progress.update(len(parts[-1]))
    nll = torch.cat(parts)
    assert len(nll) == len(ids)
    return nll


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for `longpatch demo`, or an adapter's folder")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--windows", type=int, nargs="+", required=True, metavar="W")
    parser.add_argument("--stride", type=float, default=0.5, metavar="SHARE")
    parser.add_argument("--tokens", type=int, metavar="N", help="of each text (default: all)")
    parser.add_argument("--out", type=Path, metavar="JSONL")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    records = []
    for window in arguments.windows:
        every = []
        for path in arguments.texts:
            ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
            ids = torch.tensor(ids)[: arguments.tokens]
            stride = max(1, int((window - 1) * arguments.stride))
            with tqdm(total=len(ids), desc=f"{path.name} {window}", mininterval=10) as progress:
                every.append((path.name, sliding_nll(model, ids, window, stride, tokenizer.bos_token_id, progress)))
        every.append(("all", torch.cat([nll for _, nll in every])))
        for name, nll in every:
            settings = {"window": window, "stride": arguments.stride, "text": name, "tokens": arguments.tokens}
            records.append(record(COMMAND, arguments.model, "perplexity", perplexity(nll), "1", len(nll), **settings))
        print(f"{arguments.model:<24} window {window:>6}: perplexity {perplexity(every[-1][1]):.2f}", flush=True)
        if arguments.out:
            write_records(arguments.out, records)


if __name__ == "__main__":
    main()
