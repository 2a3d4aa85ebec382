"""How often a model finds a five-digit number hidden in real text.

python -m benchmarks.passkey demo BOOK.txt --length 256 --trials 200
"""

import argparse
from pathlib import Path

import torch

from longpatch.evaluation.passkey import passkey_accuracy
from longpatch.models import load_model
from longpatch.results import record, write_records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for `longpatch demo`")
    parser.add_argument("text", type=Path, help="UTF-8 text to hide the number in")
    parser.add_argument("--length", type=int, required=True, help="tokens of each prompt together with its answer")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="JSONL", help="write the result here")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    filler = torch.tensor(tokenizer.encode(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False))
    prompt_tokens = arguments.length - len(tokenizer.encode(" 12345", add_special_tokens=False))
    found = passkey_accuracy(model, tokenizer, filler, prompt_tokens, arguments.trials, arguments.seed)
    print(f"{arguments.text.name}: {100 * found:.1f} % of {arguments.trials} at {arguments.length} tokens")
    if arguments.out:
        settings = {"text": arguments.text.name, "length": arguments.length}
        values = ("passkey_accuracy", found, "1", arguments.trials)
        result = record("benchmarks.passkey", arguments.model, *values, seed=arguments.seed, **settings)
        write_records(arguments.out, [result])


if __name__ == "__main__":
    main()
