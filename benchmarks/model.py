"""Speed of whole models, converted against unconverted, in turns within one process: `python -m benchmarks.model`.

The shape is SmolLM2-135M's (30 layers, hidden 576, FFN 1536, 9 query and 3 key heads of 64, vocabulary 49,152) with
random weights, or that of the model in the package; float32, window 1,024 or 256. What is timed is CPU time (of all
threads, so one is used), to which other programs on a busy machine add least; look at the ratios all the same. A
forward of 1,024 tokens and decoding far out run on 10 of the 30 layers, which are all alike, a prefill of 32,768 on
one.
"""

import argparse
import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import process_time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.interleaved import Case, Peer, measure, table
from longpatch import LambdaCache, convert_model
from longpatch.evaluation.memory import peak_bytes
from longpatch.results import record

COMMAND = "benchmarks.model"
WINDOW, SINKS = 1024, 10
PREFILL, CHUNK = 32_768, 1024
OUTPUT = Path(__file__).parent / "results" / "model.jsonl"


def pair(shape: str, layers: int | None = None):
    """The model of that shape, a converted one that shares its weights, and the window."""
    torch.manual_seed(0)
    if shape == "small":
        from longpatch.demo import load

        model, window, sinks = load()[0], 256, 4
    else:
        config = LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers or 30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
        )
        model, window, sinks = filled(LlamaForCausalLM, config).eval(), WINDOW, SINKS
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    return model, convert_model(twin, window, sinks), window


def filled(kind: type, config: LlamaConfig):
    """A model with random weights, each drawn once."""
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(1.0) if weight.ndim == 1 else weight.data.normal_(std=0.02)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def ids(count: int) -> torch.Tensor:
    return torch.randint(1, 4000, (1, count), generator=torch.Generator().manual_seed(0))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


def forward_peers(shape: str, count: int, layers: int | None = None) -> list[Peer]:
    """Inputs up to the window: the same logits at the same speed."""
    model, converted, _ = pair(shape, layers)
    text = ids(count)
    expected = model(text).logits
    return [
        Peer("original", partial(model, text), lambda: None),
        Peer("converted", partial(converted, text), lambda: close(converted(text).logits, expected)),
    ]


class Decode:
    """One token after a cache of `length` tokens, again and again: what it added is taken back each time."""

    def __init__(self, model, cache, token):
        self.model, self.cache, self.token = model, cache, token

    def __call__(self):
        output = self.model(self.token, past_key_values=self.cache)
        self.cache.crop(-1)
        return output.logits

    def verify(self):
        """By the way that has gradients, which is other code."""
        with torch.enable_grad():
            expected = self().detach()
        close(self(), expected)


def decode_after(converted, position: int) -> Decode:
    """A cache as after `position` tokens; time does not depend on the numbers in its ring."""
    cache = LambdaCache(converted.config, static=True)
    converted(ids(32), past_key_values=cache)
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            layer._ring(states).normal_(std=0.1)
    cache.length.fill_(position)
    cache.written.fill_(position)
    return Decode(converted, cache, ids(1))


def filled_cache(model, length: int) -> DynamicCache:
    """As after `length` tokens; time does not depend on the numbers."""
    cache, config = DynamicCache(), model.config
    shape = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.full(shape, 0.1), torch.full(shape, 0.1), layer)
    return cache


def short_decode_peers(shape: str, length: int) -> list[Peer]:
    """Equal caches inside the window."""
    model, converted, _ = pair(shape)
    text = ids(length)
    original = Decode(model, model(text).past_key_values, ids(1))
    ours = Decode(converted, converted(text).past_key_values, ids(1))
    return [
        Peer("original", original, lambda: None),
        Peer("converted", ours, lambda: close(ours(), original())),
    ]


def full_decode_peers(shape: str) -> list[Peer]:
    """As many cached keys in both: sinks, window and slack."""
    model, converted, window = pair(shape)
    settings = converted.longpatch.config
    keys = settings.global_branch + settings.local_branch + settings.slack
    original = Decode(model, filled_cache(model, keys - 1), ids(1))
    ours = decode_after(converted, 4 * window)
    return [Peer("original", original, lambda: None), Peer("converted", ours, ours.verify)]


def long_decode_peers() -> list[Peer]:
    model, converted, _ = pair("smollm2", layers=10)
    near, far = decode_after(converted, 4096), decode_after(converted, 65_536)
    original = Decode(model, filled_cache(model, PREFILL), ids(1))
    return [
        Peer("original at 32,768", original, lambda: None),
        Peer("converted at 4,096", near, near.verify),
        Peer("converted at 65,536", far, far.verify),
    ]


def prefill_peers() -> list[Peer]:
    model, converted, _ = pair("smollm2", layers=1)
    text = ids(PREFILL)

    def verify():
        cache = LambdaCache(converted.config)
        for start in range(0, PREFILL, CHUNK):
            part = converted(text[:, start : start + CHUNK], past_key_values=cache, logits_to_keep=1)
        close(converted(text, logits_to_keep=1).logits, part.logits)

    return [
        Peer("original", partial(model, text, logits_to_keep=1), lambda: None),
        Peer("converted", partial(converted, text, logits_to_keep=1), verify),
    ]


def cases() -> list[Case]:
    return [
        Case("decode small 200", {"layers": 5, "shape": "small"}, partial(short_decode_peers, "small", 200)),
        Case("decode small full window", {"layers": 5, "shape": "small"}, partial(full_decode_peers, "small")),
        Case("decode 900", {"layers": 30, "shape": "smollm2"}, partial(short_decode_peers, "smollm2", 900)),
        Case("decode full window", {"layers": 30, "shape": "smollm2"}, partial(full_decode_peers, "smollm2")),
        Case("decode far", {"layers": 10, "shape": "smollm2"}, long_decode_peers),
        Case("forward small 256", {"layers": 5, "shape": "small"}, partial(forward_peers, "small", 256)),
        Case("forward 128", {"layers": 30, "shape": "smollm2"}, partial(forward_peers, "smollm2", 128)),
        Case("forward 1024", {"layers": 10, "shape": "smollm2"}, partial(forward_peers, "smollm2", 1024, 10)),
        Case("prefill 32768", {"layers": 1, "shape": "smollm2"}, prefill_peers),
    ]


def derived(records: list[dict]) -> list[dict]:
    """Ratios and added microseconds per layer, from the medians."""
    rows = {}
    for line in records:
        rows.setdefault(line["settings"]["case"], []).append(line)
    lines = []

    def add(metric, value, unit, case, first):
        lines.append(record(COMMAND, "random weights", metric, value, unit, first["n"], seed=0, case=case))

    for case, (first, *others) in rows.items():
        for other in others:
            add(f"time of {other['settings']['peer']} over original", other["value"] / first["value"], "x", case, other)
        if case.startswith("decode") and len(others) == 1:
            added = 1000 * (others[0]["value"] - first["value"]) / first["settings"]["layers"]
            add("added per layer", added, "us", case, others[0])
        elif len(others) == 2:
            add("time at 65,536 over 4,096", others[1]["value"] / others[0]["value"], "x", case, others[1])
    return lines


def peak_megabytes(count: int) -> float:
    """Peak resident memory of a fresh process that generates after a prompt of `count` tokens, read in chunks."""
    arguments = [sys.executable, "-m", COMMAND, "--peak-of", str(count)]
    return float(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(count: int) -> None:
    _, converted, _ = pair("smollm2", layers=2)
    converted.generate(ids(count), max_new_tokens=2, do_sample=False, prefill_chunk_size=CHUNK)
    print(peak_bytes() / 2**20)  # not ru_maxrss, which on Linux begins at the peak of the process that started this one


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--rounds", type=int, default=60, help="most rounds a case")
    parser.add_argument("--seconds", type=float, default=40, help="a case stops after these, once it has three rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON lines are added here")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options.peak_of)
        return
    chosen = [case for case in cases() if options.only in case.name]
    records = measure(chosen, options.rounds, options.seconds, options.output, COMMAND, "random weights", process_time)
    lines = derived(records)
    if options.only in "peak memory":
        lines += [
            record(COMMAND, "random weights", "peak memory", peak_megabytes(count), "MB", 1, seed=0, prompt=count)
            for count in (4096, PREFILL)
        ]
    with options.output.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    print(table(records))
    for line in lines:
        print(line["settings"], line["metric"], f"{line['value']:.4g}", line["unit"])


if __name__ == "__main__":
    main()
