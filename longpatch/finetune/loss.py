"""The loss of a long row without its logits: they exist for a chunk of tokens at a time, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..changes import Changes
from ..convert import unwrap
from ..data.rows import IGNORED


def chunked_loss(hidden: Tensor, labels: Tensor, causal: Any, chunk: int) -> Tensor:
    """Sum of the cross-entropies, in nats, of `labels` [B, n] after final `hidden` states [B, n, h].

    The logits of `chunk` tokens exist at one time: 80k tokens times a vocabulary of 128k would be 41 GB in float32.
    """
    kept = labels != IGNORED
    hidden, labels = hidden[kept], labels[kept]
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(_sum, part, targets, causal, use_reentrant=False)
    return total


def _sum(hidden: Tensor, labels: Tensor, causal: Any) -> Tensor:
    return cross_entropy(_logits(causal, hidden).float(), labels, reduction="sum")


def _logits(causal: Any, hidden: Tensor) -> Tensor:
    """As the model's own forward makes them, with what some families do after the head."""
    config = causal.config.get_text_config(decoder=True)
    logits = causal.get_output_embeddings()(hidden)
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else (logits / cap).tanh() * cap


def chunk_loss(model: Any, chunk: int = 1024, prompt_grad: bool = True) -> Changes:
    """Let a forward with labels return the chunked loss and no logits, in place; `undo()` takes it back.

    Args:
        prompt_grad: False reads what comes before the first label without gradient, into a cache, and learns from the
            rest alone (as LM-Infinite trains, arXiv 2308.16137, section 4); one row at a time.
    """
    causal = unwrap(model)
    changes = Changes()
    changes.replace_forward(causal, forward, chunk, prompt_grad)
    return changes


def forward(
    causal: Any,
    chunk: int,
    prompt_grad: bool,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
):
    """Stands in for the model's forward; without `labels` it is the model's own."""
    if labels is None:
        return type(causal).forward(causal, input_ids, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("use_cache", "return_dict")}
    cache = None
    if not prompt_grad:
        assert input_ids is not None
        prompt = int((labels[0] != IGNORED).nonzero()[0]) - 1
        if prompt > 0:
            with torch.no_grad():
                cache = causal.base_model(input_ids=input_ids[:, :prompt], use_cache=True).past_key_values
            input_ids, labels = input_ids[:, prompt:], labels[:, prompt:]
    hidden = causal.base_model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, **kwargs)[0]
    total = chunked_loss(hidden[:, :-1], labels[:, 1:], causal, chunk)
    count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithPast(loss=total / torch.as_tensor(count, device=total.device).clamp_min(1))
