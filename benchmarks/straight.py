"""What learning costs while a model writes: `TempLoraGenerator`, a straight loop with peft, and plain generation.

    python -m benchmarks.straight smollm2 BOOK.txt --no-context-grad --out FILE
    python -m benchmarks.straight demo BOOK.txt --chunk-tokens 128 --context-tokens 128 --rank 16

All three write the same text, which a logits processor dictates, after a prompt of `context` tokens of it; both
learners start from the same numbers, without dropout. The straight loop is what one writes first: an adapter of peft,
not merged; for each chunk `generate` reads the context anew; the loss is the model's own, by `labels`. Times are of the
processor.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from longpatch import TempLoraGenerator, temp_lora
from longpatch.demo import load
from longpatch.results import record, write_records


class Dictated(LogitsProcessor):
    """Whatever the model thinks, the next token is that of `text` [n]; the prompt began at token `start`."""

    def __init__(self, text: Tensor, start: int = 0):
        self.text, self.start = text, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.text[self.start + input_ids.shape[1]]
        return torch.full_like(scores, -torch.inf).index_fill_(1, wanted, 0.0)


def straight_loop(model, text: Tensor, chunk: int, context: int, rank: int, rate: float, epochs: int):
    """Write `text` [n] after its first `context` tokens, learning each chunk but the last.

    Returns the mean NLL of each chunk learned before learning it, and the seconds of generating and of learning.
    """
    with temp_lora(model, rank=rank) as learner:  # the same first numbers
        downs = [down[0].detach().clone() for _, down, _ in learner.start(1)._views]
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(learner.targets))
    peft = get_peft_model(model, config)
    layers = [module for module in peft.modules() if hasattr(module, "lora_A")]
    for layer, down in zip(layers, downs, strict=True):
        layer.lora_A["default"].weight.data = down
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], rate, eps=1e-7, weight_decay=0.0)
    losses, spent, steps = [], {"generate": 0.0, "learn": 0.0}, 0
    for start in range(context, len(text), chunk):
        began = time.process_time()
        stop = min(start + chunk, len(text))
        peft.eval()
        ids = peft.generate(
            input_ids=text[None, start - context : start],
            max_new_tokens=stop - start,
            do_sample=False,
            logits_processor=LogitsProcessorList([Dictated(text, start - context)]),
        )
        spent["generate"] += time.process_time() - began
        if stop == len(text):
            break
        began = time.process_time()
        labels = ids.clone()
        labels[:, :context] = -100
        peft.train()
        for epoch in range(epochs):
            steps += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, steps / 2)
            loss = peft(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not epoch:
                losses.append(loss.item())
        spent["learn"] += time.process_time() - began
    peft.unload()
    model.eval()
    return losses, spent


def generator_run(model, text: Tensor, chunk: int, context: int, rank: int, rate: float, epochs: int, grad: bool):
    """The same by `TempLoraGenerator`; `grad`: gradients flow into the context."""
    generator = TempLoraGenerator(
        model,
        chunk_tokens=chunk,
        context_tokens=context,
        rank=rank,
        alpha=rank,
        dropout=0.0,
        learning_rate=rate,
        epochs=epochs,
        context_grad=grad,
        measure=False,
        progress=False,
    )
    began = time.process_time()
    generator.generate(
        text[None, :context],
        max_new_tokens=len(text) - context,
        do_sample=False,
        logits_processor=LogitsProcessorList([Dictated(text)]),
    )
    used = time.process_time() - began
    wall = {part: sum(entry[f"{part}_seconds"] for entry in generator.history) for part in ("learn", "rebuild")}
    return [math.log(entry["perplexity_before"]) for entry in generator.history], used, wall


def plain_run(model, text: Tensor, context: int) -> float:
    began = time.process_time()
    model.generate(
        text[None, :context],
        max_new_tokens=len(text) - context,
        do_sample=False,
        logits_processor=LogitsProcessorList([Dictated(text)]),
    )
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, smollm2, a folder or a hub name")
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--context-tokens", type=int, default=768)
    parser.add_argument("--chunks", type=int, default=3, help="the last one is not learned")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--no-context-grad", action="store_true", help="the generator detaches the context")
    parser.add_argument("--plain", action="store_true", help="time generation without learning as well")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    chunk, context = arguments.chunk_tokens, arguments.context_tokens
    count = context + chunk * arguments.chunks
    text = torch.tensor(tokenizer.encode(arguments.text.read_text(encoding="utf-8")[: 20 * count]))[:count]
    learning = (chunk, context, arguments.rank, arguments.rate, arguments.epochs)
    ours, used, wall = generator_run(model, text, *learning, not arguments.no_context_grad)
    print(f"generator {used:.1f} s", wall, flush=True)
    theirs, spent = straight_loop(model, text, *learning)
    print("straight loop", spent, flush=True)
    new = count - context
    perplexities = {"generator": math.exp(sum(ours) / len(ours)), "straight loop": math.exp(sum(theirs) / len(theirs))}
    times = {"generator": used, "straight loop": sum(spent.values())}
    if arguments.plain:
        times["plain"] = plain_run(model, text, context)
    settings = {
        name: getattr(arguments, name)
        for name in ("chunk_tokens", "context_tokens", "chunks", "rank", "rate", "epochs", "no_context_grad")
    }
    lines = [
        *(("perplexity", value, "1", name) for name, value in perplexities.items()),
        *(("time", 1e3 * value / new, "ms/token", name) for name, value in times.items()),
        *((f"{part}_time", 1e3 * value / new, "ms/token", "straight loop") for part, value in spent.items()),
        *((f"{part}_wall_time", 1e3 * value / new, "ms/token", "generator") for part, value in wall.items()),
    ]
    for metric, value, unit, name in lines:
        print(f"{name:<16}{metric:<20}{value:10.3f} {unit}")
    print(f"{times['straight loop'] / times['generator']:.2f} times as fast")
    if arguments.out:
        write_records(
            arguments.out,
            [
                record("benchmarks.straight", arguments.model, m, v, u, new, way=name, **settings)
                for m, v, u, name in lines
            ],
        )


if __name__ == "__main__":
    main()
