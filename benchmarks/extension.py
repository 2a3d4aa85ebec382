"""Perplexity of whole texts in sliding windows, of a model and of what training made of it.

    python -m benchmarks.extension demo BOOK... --windows 256 1024 --out extension.jsonl
    python -m benchmarks.extension runs/cpu-demo BOOK... --windows 256 1024 --out extension.jsonl

Each window starts with BOS. It moves by `--stride` of its length (default: half), and only tokens that no earlier
window has scored are scored, so that each token is, once. A stride of 1 cuts the text into fresh windows.
"""

import argparse
from math import exp, log
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from longpatch.convert import unwrap
from longpatch.evaluation.perplexity import perplexity
from longpatch.models import load_model
from longpatch.results import read_records, record, write_records

COMMAND = "benchmarks.extension"
BATCH_TOKENS = 8192


@torch.no_grad()
def sliding_nll(model, ids, window, stride, bos, progress=None):
    """NLL [n] in nats of `ids` [n], each with at least `window - stride` tokens before it where the text has them."""
    jobs, scored = [], 0  # (first token, last + 1, first that is scored)
    for start in range(0, max(1, len(ids) - (window - 1) + stride), stride):
        stop = min(start + window - 1, len(ids))
        if stop > scored:
            jobs.append((start, stop, scored))
            scored = stop
    parts, batch = [], max(1, BATCH_TOKENS // window)
    full = [job for job in jobs if job[1] - job[0] == window - 1]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)] + [[job] for job in jobs[len(full) :]]
    for group in groups:
        rows = torch.stack([torch.cat((ids.new_tensor([bos]), ids[start:stop])) for start, stop, _ in group])
        hidden = model.base_model(input_ids=rows, use_cache=False)[0]
        for (start, _, first), states, row in zip(group, hidden, rows, strict=True):
            logits = model.get_output_embeddings()(states[first - start : -1]).float()
            parts.append(cross_entropy(logits, row[1 + first - start :], reduction="none"))
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
    parser.add_argument("--name", help="what the records call the model (default: as given)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="JSONL", help="texts that are in it are not read again"
    )
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    model = unwrap(model)
    name = arguments.name or arguments.model
    records = read_records(arguments.out) if arguments.out.exists() else []
    for window in arguments.windows:
        settings = {"window": window, "stride": arguments.stride, "tokens": arguments.tokens}
        for path in arguments.texts:
            wanted = settings | {"text": path.name}
            if any(r["model"] == name and r["settings"] == wanted for r in records):
                continue
            ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
            ids = torch.tensor(ids)[: arguments.tokens]
            stride = max(1, int((window - 1) * arguments.stride))
            with tqdm(total=len(ids), desc=f"{path.name} {window}", mininterval=10) as progress:
                nll = sliding_nll(model, ids, window, stride, tokenizer.bos_token_id, progress)
            records.append(record(COMMAND, name, "perplexity", perplexity(nll), "1", len(nll), **wanted))
            write_records(arguments.out, records)
        texts = [
            r
            for r in records
            if r["model"] == name and r["settings"] in [settings | {"text": path.name} for path in arguments.texts]
        ]
        total = sum(r["n"] for r in texts)
        mean = exp(sum(log(r["value"]) * r["n"] for r in texts) / total)
        records = [r for r in records if r["model"] != name or r["settings"] != settings | {"text": "all"}]
        records.append(record(COMMAND, name, "perplexity", mean, "1", total, **settings, text="all"))
        write_records(arguments.out, records)
        print(f"{name:<24} window {window:>6}: perplexity {mean:.2f}", flush=True)


if __name__ == "__main__":
    main()
