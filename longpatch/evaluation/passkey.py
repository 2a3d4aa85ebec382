"""A five-digit number hidden in text and asked for at the end (Mohtashami and Jaggi, arXiv 2305.16300)."""

import random

import torch
from torch import Tensor

ANSWER_PREFIX = "\nWhat is the pass key? The pass key is"


def passkey_line(key: str) -> str:
    return f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"


def passkey_prompt(tokenizer, filler: Tensor, length: int, depth: float, key: str) -> Tensor:
    """Token ids [length]: BOS, `filler` ids with the passkey line at `depth` (0 = start, 1 = end), and the question."""

    def encode(text):
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    bos = torch.tensor([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=torch.long)
    line, question = encode(passkey_line(key)), encode(ANSWER_PREFIX)
    room = length - len(bos) - len(line) - len(question)
    if room < 0 or room > len(filler):
        raise ValueError(f"length {length} needs a filler of {room} tokens, got {len(filler)}")
    place = round(depth * room)
    return torch.cat((bos, filler[:place], line, filler[place:room], question))


def passkey_accuracy(model, tokenizer, filler: Tensor, length: int, trials: int, seed: int = 0) -> float:
    """Share of `trials` prompts of `length` tokens whose key the model continues with, greedily; depths spread evenly.

    `filler` [n] are token ids of plain text; each trial takes another stretch of them.
    """
    rng = random.Random(seed)
    found = 0
    for trial in range(trials):
        key = f"{rng.randrange(10_000, 100_000)}"
        start = rng.randrange(max(1, len(filler) - length))
        prompt = passkey_prompt(tokenizer, filler[start : start + length], length, trial / max(1, trials - 1), key)
        answer = tokenizer.encode(f" {key}", add_special_tokens=False)
        output = model.generate(
            prompt[None].to(model.device),
            attention_mask=torch.ones_like(prompt)[None].to(model.device),
            max_new_tokens=len(answer),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        found += key in tokenizer.decode(output[0, length:])
    return found / trials
