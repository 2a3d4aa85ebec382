"""`longpatch demo`: one text read by the original and by the converted model, side by side."""

import itertools
import time
from argparse import Namespace

import torch
from torch import Tensor
from transformers import set_seed

from ..convert import convert_model, revert_model
from ..errors import LongpatchError
from ..evaluation.perplexity import perplexity
from ..results import record, write_records
from .plot import draw
from .reading import CHUNK_TOKENS, Reading, read

PREVIEW_CHARACTERS = 400


def run(arguments: Namespace, text: str, text_name: str, model, tokenizer, settings: dict) -> None:
    """Read, compare, continue, plot; `settings` are those of convert_model.

    Raises:
        LongpatchError: for a model or text that cannot be used.
    """
    trained = model.config.max_position_embeddings
    wanted = arguments.tokens or min(64 * trained, max(16_384, 3 * trained))
    ids = _encode(tokenizer, text, wanted)
    if len(ids) <= 2 * trained:
        raise LongpatchError(
            "demo",
            [f"{text_name} gives {len(ids)} tokens to read"],
            f"more than twice the training length, {2 * trained}",
        )
    conversion = convert_model(model, **settings).longpatch.config  # refuses what cannot work before the long part
    revert_model(model)
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

    print(_table(readings, trained))
    for reading in readings:
        print(f"\n{reading.label}, going on after {len(prompt):,} tokens:\n    {reading.continuation}")
    draw(arguments.plot, readings, trained, f"{arguments.model} on {text_name}")
    print(f"\nPlot: {arguments.plot.resolve()}")
    if arguments.out:
        write_records(arguments.out, _records(arguments, readings, conversion, len(ids)))
        print(f"Results: {arguments.out.resolve()}")


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


def _spans(tokens: int, trained: int) -> list[tuple[int, int]]:
    """[0, T), [T, 2T), [2T, 4T), ... up to `tokens`."""
    edges = [0, trained]
    while edges[-1] < tokens:
        edges.append(min(2 * edges[-1], tokens))
    return list(itertools.pairwise(edges))


def _table(readings: list[Reading], trained: int) -> str:
    labels = [reading.label for reading in readings]
    lines = ["", f"{'perplexity at positions':<28}" + "".join(f"{label:>12}" for label in labels)]
    for start, stop in _spans(len(readings[0].nll), trained):
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
