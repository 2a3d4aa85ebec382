"""An adapter becomes part of the model that it was trained on."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoConfig

from ..adapter import load_adapter, read_record
from ..demo.text import read_text
from ..errors import LongpatchError
from ..models import DEMO_FOLDER, load_model

PROBE_TOKENS = 256


@dataclass(frozen=True)
class Gap:
    """How far two models are apart on one text: largest difference of logits, and mean divergence in nats a token."""

    against: str
    logits: float
    divergence: float

    def __str__(self) -> str:
        return f"merged against {self.against}: logits differ by {self.logits:.2e} at most, {self.divergence:.2e} nats"


def merge(base: str, adapter: str | Path, out: str | Path, quantized_gap: bool = True) -> list[Gap]:
    """Add `adapter` to the stored, unquantised weights of `base` in float32 and save in their dtype.

    What the adapter needs of positions is in the merged config.json; nothing else has to be kept.

    Returns:
        How far the merged model, as saved, is from base + adapter unquantised, and from the quantised one it was
        trained as.

    Raises:
        LongpatchError: for an adapter whose files are not complete, or an `out` that holds a model.
    """
    if (Path(out) / "config.json").exists():
        raise LongpatchError("merge", [f"{out} holds a model already"], "a new folder")
    trained_on = read_record(adapter).get("base", base)
    if not _same(base, trained_on):
        warnings.warn(f"{adapter} was trained on {trained_on}, and is merged into {base}", stacklevel=2)
    model, tokenizer = load_model(base, torch.float32)
    stored = stored_dtype(base)
    model = load_adapter(model, adapter).eval()
    text, _ = read_text(None)
    ids = torch.tensor(tokenizer.encode(text[: 8 * PROBE_TOKENS]))[None, :PROBE_TOKENS]
    expected = _logits(model, ids)
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.to(stored).save_pretrained(out)
    tokenizer.save_pretrained(out)
    actual = _logits(load_model(str(out), torch.float32)[0], ids)
    gaps = [gap("base + adapter, unquantised", actual, expected)]
    kind = read_record(adapter).get("quantization", "none")
    if quantized_gap and kind != "none":
        quantised = load_adapter(load_model(base, torch.float32, quantization=kind)[0], adapter).eval()
        gaps.append(gap(f"base in {kind} + adapter", actual, _logits(quantised, ids)))
    return gaps


def _same(first: str, second: str) -> bool:
    return first == second or Path(first).resolve() == Path(second).resolve()


def stored_dtype(name: str) -> torch.dtype:
    """The dtype of a model's files; float32 where they do not say (GGUF)."""
    if name == "smollm2" or name.endswith(".gguf"):
        return torch.float32
    config = AutoConfig.from_pretrained(str(DEMO_FOLDER) if name == "demo" else name)
    return getattr(config, "dtype", None) or torch.float32


def gap(against: str, actual: Tensor, expected: Tensor) -> Gap:
    """Compare logits [1, n, V]."""
    divergence = kl_div(log_softmax(actual, -1), log_softmax(expected, -1), reduction="none", log_target=True)
    return Gap(against, (actual - expected).abs().max().item(), divergence.sum(dim=-1).mean().item())


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
