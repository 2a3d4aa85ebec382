"""Train the small Llama that travels inside the package.

    python examples/train_demo_model.py BOOKS_DIR --out longpatch/demo/model

BOOKS_DIR is any folder of .txt files. Beside the books the model sees the docstrings of Python's standard library and
"passkey" windows: a line with a five-digit number hidden in text, asked for at the end. Every window starts with BOS,
so that the first token can become an attention sink. CPU or CUDA; as many steps as the defaults make took 91 minutes
on two CPU cores that other work shared.

Passkeys are learned only if they come early and short: for the first `--curriculum-steps` steps windows are 64, 96,
then up to T tokens long, half of them hold a passkey, and the copied digits weigh ten times as much as other tokens.
"""

import argparse
import ast
import copy
import itertools
import json
import random
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longpatch.evaluation.passkey import ANSWER_PREFIX, passkey_line

BOS = "<s>"
ANSWER_WEIGHT = 10.0


def standard_library_docstrings():
    """Docstrings of the running Python's standard library, one string per module. The demo's text stays out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(docstring for docstring in found if docstring and len(docstring) > 60)
        if text:
            yield text


def train_tokenizer(texts, vocabulary_size):
    """Byte-level BPE with every digit a token of its own, so that numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=BOS, eos_token=BOS)


class Windows:
    """Draws training windows: `input_ids`, `targets` and `weights`, each `[batch, length]`."""

    def __init__(self, sources, shares, tokenizer, seed):
        self.sources, self.shares, self.bos = sources, shares, tokenizer.bos_token_id
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.rng = random.Random(seed)

    def text(self, length):
        source = self.rng.choices(self.sources, self.shares)[0]
        start = self.rng.randrange(len(source) - length)
        return source[start : start + length].tolist()

    def passkey(self, length):
        """A passkey line at a random place, and the question with its answer at the very end: tokens and weights."""
        key = f"{self.rng.randrange(10_000, 100_000)}"
        line, question = self.encode(passkey_line(key)), self.encode(ANSWER_PREFIX)
        answer = self.encode(f" {key}.")
        filler = self.text(length - len(line) - len(question) - len(answer))
        place = self.rng.randint(0, len(filler))
        tokens = filler[:place] + line + filler[place:] + question + answer
        return tokens, [1.0] * (length - len(answer)) + [ANSWER_WEIGHT] * len(answer)

    def batch(self, tokens_in_batch, length, passkey_share):
        rows, weights = [], []
        for _ in range(tokens_in_batch // length):
            if self.rng.random() < passkey_share:
                row, weight = self.passkey(length)
            else:
                row, weight = self.text(length), [1.0] * length
            rows.append([self.bos, *row])
            weights.append(weight)
        rows = torch.tensor(rows)
        return rows[:, :-1], rows[:, 1:], torch.tensor(weights)


def window_length(step, curriculum_steps, longest, rng):
    """64 and 96 tokens for the first three fifths of the curriculum, then 128 or `longest`, then always `longest`."""
    if step >= curriculum_steps:
        return longest
    return rng.choice((64, 96)) if step < 0.6 * curriculum_steps else rng.choice((128, longest))


def learning_rate_factor(step, done, warmup_steps, decay_fraction):
    """Linear warm-up, constant, then linear decay to zero over the last `decay_fraction`; `done` goes from 0 to 1."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return warmup * min(1.0, max(0.0, 1.0 - done) / max(1e-9, decay_fraction))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al., 2024), scaled to AdamW's update size.

    torch.optim.Muon iterates in bfloat16, which takes ten times a whole training step on a CPU without bfloat16 units;
    this one stays in float32 and treats all matrices of one shape in one batched product.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                updates = orthogonalise(torch.stack(updates)) * (0.2 * max(shape) ** 0.5)
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def orthogonalise(matrices):
    """Move the singular values of `matrices` [count, rows, columns] near 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def build_optimizers(model, lr_matrices, lr_others):
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        Muon(hidden, lr=lr_matrices),
        torch.optim.AdamW(others, lr=lr_others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(model, tokenizer, out, runs):
    """Weights as float16 safetensors (the package has little room), tokenizer and a record of how they were made."""
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(runs, indent=2) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model and the tokenizer to")
    parser.add_argument("--init", type=Path, help="go on from this model and tokenizer instead of starting anew")
    parser.add_argument("--steps", type=int, default=1520)
    parser.add_argument("--minutes", type=float, help="train this long, however many steps that is, instead of --steps")
    parser.add_argument("--curriculum-steps", type=int, default=300)
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256, help="training length T in tokens")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--ffn", type=int, default=688)
    parser.add_argument(
        "--passkey-share", type=float, default=0.06, help="share of passkey windows after the curriculum"
    )
    parser.add_argument("--lr-matrices", type=float, default=4e-3)
    parser.add_argument("--lr-others", type=float, default=4e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--decay-fraction", type=float, default=0.37)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    books = [path.read_text(encoding="utf-8") for path in sorted(arguments.books.glob("*.txt"))]
    if not books:
        raise SystemExit(f"{arguments.books}: no .txt files")
    docstrings = list(standard_library_docstrings())

    earlier_runs = []
    if arguments.init:
        earlier_runs = json.loads((arguments.init / "training.json").read_text())
        model = LlamaForCausalLM.from_pretrained(arguments.init, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.init)
    else:
        tokenizer = train_tokenizer([*books, *docstrings], arguments.vocabulary)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=arguments.vocabulary,
                hidden_size=arguments.hidden,
                intermediate_size=arguments.ffn,
                num_hidden_layers=arguments.layers,
                num_attention_heads=arguments.hidden // 64,
                num_key_value_heads=max(1, arguments.hidden // 128),
                max_position_embeddings=arguments.window,
                tie_word_embeddings=True,
                attention_bias=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.to(device).train()
    sources = [
        np.array([t for text in texts for t in tokenizer.encode(text, add_special_tokens=False)], dtype=np.uint16)
        for texts in (books, docstrings)
    ]
    data = {"book_tokens": len(sources[0]), "docstring_tokens": len(sources[1])}
    data["book_bytes_per_token"] = sum(len(b.encode()) for b in books) / len(sources[0])
    print(json.dumps({"parameters": model.num_parameters(), **data}), flush=True)

    windows = Windows(sources, [0.95, 0.05], tokenizer, arguments.seed)
    optimizers = build_optimizers(model, arguments.lr_matrices, arguments.lr_others)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    forward = torch.compile(model) if arguments.compile else model
    started, smooth = time.perf_counter(), None
    progress = tqdm(itertools.count(), total=None if arguments.minutes else arguments.steps, mininterval=5)
    for step in progress:
        spent = (time.perf_counter() - started) / 60
        done = spent / arguments.minutes if arguments.minutes else step / arguments.steps
        curriculum = step < arguments.curriculum_steps
        length = window_length(step, arguments.curriculum_steps, arguments.window, windows.rng)
        share = 0.5 if curriculum else arguments.passkey_share
        ids, targets, weights = (t.to(device) for t in windows.batch(arguments.tokens_per_step, length, share))
        logits = forward(input_ids=ids, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(step, done, arguments.warmup_steps, arguments.decay_fraction)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        plain = losses.detach()[weights == 1].mean().item()
        answers = losses.detach()[weights > 1]
        smooth = plain if smooth is None else 0.98 * smooth + 0.02 * plain
        progress.set_postfix(
            loss=f"{smooth:.3f}", answer=f"{answers.mean():.3f}" if len(answers) else "-", length=length, refresh=False
        )
        last = done >= 1 if arguments.minutes else step + 1 == arguments.steps
        if (step + 1) % arguments.save_every == 0 or last:
            run = {
                "steps": step + 1,
                "tokens": (step + 1) * arguments.tokens_per_step,
                "seconds": round(time.perf_counter() - started),
                "text_loss_nats_per_token": round(smooth, 4),
                "settings": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
                **data,
            }
            save(model, tokenizer, arguments.out, [*earlier_runs, run])
        if last:
            break


if __name__ == "__main__":
    main()
