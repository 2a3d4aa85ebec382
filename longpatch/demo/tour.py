"""`longpatch demo`: one text read by the original and by the converted model, side by side."""

import itertools
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

from ..convert import convert_model, revert_model, unwrap
from ..errors import LongpatchError
from ..evaluation.perplexity import perplexity
from ..families import FAMILIES, trained_length
from ..results import record, write_records
from .plot import draw
from .reading import CHUNK_TOKENS, Reading, read

PREVIEW_CHARACTERS = 400


def run(arguments: Namespace, text: str, text_name: str, model, tokenizer, settings: dict) -> None:
    """Read, compare, continue, plot; `settings` are those of convert_model.

    Raises:
        LongpatchError: for a model, text or file name that cannot be used, before the text is read.
    """
    causal = unwrap(convert_model(model, **settings))
    conversion, trained = causal.longpatch.config, trained_length(causal.config)
    revert_model(model)
    ids = _encode(tokenizer, text, arguments.tokens or max(16_384, 3 * trained))
    _refuse_short(len(ids), conversion.local_branch, arguments.tokens, text_name)
    if FAMILIES[causal.config.model_type].ends and len(ids) + arguments.new_tokens > trained:
        reason = f"before its conversion the model ends at {trained:,} tokens"
        raise LongpatchError("demo", [reason], "--tokens and --new-tokens within that, and a smaller --local-branch")
    _refuse_unwritable({"--plot": arguments.plot, "--out": arguments.out})
    edge, edge_name = (trained, "training length") if len(ids) > trained else (conversion.local_branch, "window")
    prompt = ids[: min(4 * trained, trained + 2048, len(ids))]
    needed = _estimate(model, ids, arguments.new_tokens)
    print(f"{arguments.model}, trained on {trained:,} tokens, reads {len(ids):,} tokens of {text_name}", end=" ")
    print(f"twice and writes {arguments.new_tokens} more: about {needed}.", flush=True)

    readings = []
    for label in ("original", "converted"):
        if label == "converted":
            convert_model(model, **settings)
        readings.append(read(model, ids, label))
        set_seed(arguments.seed)
        readings[-1].continuation = _continue(model, tokenizer, prompt, arguments.new_tokens)
    revert_model(model)

    print(_table(readings, edge))
    for reading in readings:
        print(f"\n{reading.label}, going on after {len(prompt):,} tokens:\n    {reading.continuation}")
    draw(arguments.plot, readings, edge, edge_name, f"{arguments.model} on {text_name}")
    print(f"\nPlot: {arguments.plot.resolve()}")
    if arguments.out:
        write_records(arguments.out, _records(arguments, readings, conversion, len(ids)))
        print(f"Results: {arguments.out.resolve()}")


def _refuse_short(tokens: int, window: int, asked: int | None, text_name: str) -> None:
    if tokens <= window:
        inside = asked is not None and asked <= window
        reason = (
            f"--tokens {asked} ends inside the window" if inside else f"{text_name} gives {tokens:,} tokens to read"
        )
        more = "more tokens" if inside else "a longer --text"
        raise LongpatchError("demo", [reason], f"{more} than the window, {window:,}, or a smaller --local-branch")


def _refuse_unwritable(files: dict[str, Path | None]) -> None:
    reasons = []
    for flag, path in files.items():
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("ab").close()
        except OSError as error:
            reasons.append(f"{flag} {path} cannot be written: {error.strerror}")
    if reasons:
        raise LongpatchError("demo", reasons)


def _encode(tokenizer, text: str, tokens: int) -> Tensor:
    """The first `tokens` token ids of `text`, BOS first."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer.encode(text[: 12 * tokens], add_special_tokens=False)
    return torch.tensor((bos + ids)[:tokens])


def _estimate(model, ids: Tensor, new_tokens: int) -> str:
    """Time for everything, from one short chunk and one token, with as much again for attention over the cache."""
    times = []
    for tokens in (256, 1):
        sample = ids[None, :tokens].to(model.device)
        with torch.no_grad():
            model(input_ids=sample, use_cache=False)
            began = time.perf_counter()
            model(input_ids=sample, use_cache=False)
        times.append(time.perf_counter() - began)
    seconds = 2 * (3 * len(ids) / 256 * times[0] + new_tokens * 1.5 * times[1])
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _continue(model, tokenizer, prompt: Tensor, new_tokens: int) -> str:
    inputs = prompt[None].to(model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = " ".join(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).split())
    return text if len(text) <= PREVIEW_CHARACTERS else text[:PREVIEW_CHARACTERS] + " ..."


def _spans(tokens: int, edge: int) -> list[tuple[int, int]]:
    """[0, E), [E, 2E), [2E, 4E), ... up to `tokens`, with E = `edge`."""
    edges = [0, edge]
    while edges[-1] < tokens:
        edges.append(min(2 * edges[-1], tokens))
    return list(itertools.pairwise(edges))


def _table(readings: list[Reading], edge: int) -> str:
    labels = [reading.label for reading in readings]
    lines = ["", f"{'perplexity at positions':<28}" + "".join(f"{label:>12}" for label in labels)]
    for start, stop in _spans(len(readings[0].nll), edge):
        values = "".join(f"{perplexity(reading.nll[start:stop]):>12,.1f}" for reading in readings)
        lines.append(f"{f'{start:,} to {stop:,}':<28}{values}")
    for title, column in (("cache at the end, MB", "cache_mb"), ("time per token at the end, ms", "token_ms")):
        lines.append(f"{title:<28}" + "".join(f"{getattr(reading, column)[-1]:>12.2f}" for reading in readings))
    return "\n".join(lines)


def _records(arguments: Namespace, readings: list[Reading], conversion, tokens: int) -> list[dict]:
    def line(reading, metric, value, unit, n, **settings):
        settings |= {"arm": reading.label}
        if reading.label == "converted":
            settings |= conversion.to_marker()
        return record("demo", arguments.model, metric, value, unit, n, seed=arguments.seed, **settings)

    lines = []
    for reading in readings:
        lines.append(line(reading, "perplexity", perplexity(reading.nll), "1", tokens - 1))
        lines.append(line(reading, "cache", reading.cache_mb[-1], "MiB", tokens))
        lines.append(line(reading, "time_per_token", reading.token_ms[-1], "ms", CHUNK_TOKENS))
    return lines
