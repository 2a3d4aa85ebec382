"""LM-Infinite's diagnosis (arXiv 2308.16137, section 3), redrawn from one's own model.

Far beyond the trained length attention logits grow and their entropy rises with the logarithm of the number of keys;
and the hidden states of the first tokens lie apart from all others.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention import attend
from ..errors import LongpatchError
from ..rope import rotate
from .arms import Arm
from .run import Measurement, Sample, Work

NAME = "longpatch_recorder"


@dataclass
class Recorder:
    """Entropy and largest logit of the attention of the queries at `positions`; [heads, positions] for each layer."""

    positions: Tensor
    entropy: list[Tensor] = field(default_factory=list)
    largest: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor) -> None:
        """`logits` [heads, positions, keys], -inf where a key is not visible."""
        weights = logits.softmax(-1)
        self.entropy.append(torch.special.entr(weights).sum(-1))
        self.largest.append(logits.amax(-1))


_current: ContextVar[Recorder] = ContextVar("recorder")


def _record(module, query, key, value, attention_mask, scaling=None, longpatch=None, **kwargs):
    """An attention function of transformers: looks at some rows of logits, then attends as the model would."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        reason = "its scores are soft-capped, or learned sinks join the softmax"
        raise LongpatchError("eval attention", [reason], "families of plain softmax")
    if isinstance(attention_mask, tuple):  # see Family.drops_keywords
        longpatch, attention_mask = attention_mask, None
    recorder = _current.get()
    places = recorder.positions.to(query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    rows, keys = query[0, :, places].float(), key[0].float().repeat_interleave(groups, 0)
    logits = scale * rows @ keys.transpose(1, 2)
    columns = torch.arange(keys.shape[1], device=query.device)
    visible = columns <= places[:, None] if attention_mask is None else attention_mask[0, 0, places]
    if longpatch is not None:
        step, _ = longpatch
        settings = step.layers[module.layer_idx]
        config = settings.config
        if config.recall is not None:
            raise LongpatchError("eval attention", ["recalled tokens join the softmax"], "--recall none")
        near = (columns <= places[:, None]) & (places[:, None] - columns < config.local_branch)
        logits = logits.masked_fill(~near, -math.inf)
        if config.global_branch and step.far_phase is not None:
            sinks, _, _ = step.sinks(key, value, 0, settings.rotated)
            far_query = rotate(query, step.far_phase) if settings.rotated else query
            far_rows = far_query[0, :, places].float()
            far = scale * far_rows @ sinks[0].float().repeat_interleave(groups, 0).transpose(1, 2)
            outside = places[:, None] - columns[: config.global_branch] >= config.local_branch
            logits = torch.cat((logits, far[..., : outside.shape[1]].masked_fill(~outside, -math.inf)), dim=-1)
        recorder.add(logits)
        return attend(module, query, key, value, attention_mask, scaling=scaling, longpatch=longpatch, **kwargs)
    recorder.add(logits.masked_fill(~visible, -math.inf))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def recording(model, positions: Sequence[int]) -> Iterator[Recorder]:
    """While it lasts, forwards of `model` (one text, no cache) record the attention of the queries at `positions`.

    Raises:
        LongpatchError: in such a forward, for attention that is no plain softmax; afterwards, where none was recorded.
    """
    AttentionInterface.register(NAME, _record)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    recorder = Recorder(torch.tensor(positions))
    token = _current.set(recorder)
    model.set_attn_implementation(NAME)
    try:
        yield recorder
        if not recorder.entropy:
            reason = f"the attention of model_type={model.config.model_type!r} does not go through AttentionInterface"
            raise LongpatchError("eval attention", [reason], "families whose attention does, such as llama")
    finally:
        model.set_attn_implementation(before)
        _current.reset(token)


def principal_components(states: Tensor, count: int = 2) -> Tensor:
    """The first `count` principal components [n, count] of `states` [n, d], each with its largest entry positive."""
    centred = states.double() - states.double().mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    components = left[:, :count] * values[:count]
    return components * components.gather(0, components.abs().argmax(0, keepdim=True)).sign()


@dataclass
class Attention:
    """The evaluation: entropy and largest logit, means over heads (and over layers, unless `by_layer`), by position;

    and the first two principal components of the hidden states after layer `pca_layer`, over the same positions.
    """

    model: Any
    positions: Sequence[int]
    by_layer: bool = False
    pca_layer: int = 1

    @torch.no_grad()
    def measure(self, arm: Arm, sample: Sample, work: Work) -> Iterator[Measurement]:
        ids = sample.content["ids"]
        places = [position for position in self.positions if position < len(ids)]
        with recording(self.model, places) as recorder:
            output = self.model(
                input_ids=ids[None].to(self.model.device), use_cache=False, output_hidden_states=True, logits_to_keep=1
            )
        for name, unit, layers in (("entropy", "nat", recorder.entropy), ("largest_logit", "1", recorder.largest)):
            means = torch.stack(layers).mean(1).cpu()
            for layer, row in enumerate(means) if self.by_layer else [(None, means.mean(0))]:
                for position, value in zip(places, row.tolist(), strict=True):
                    settings = {"position": position} | ({} if layer is None else {"layer": layer})
                    yield Measurement(name, value, unit, 1, settings)
        components = principal_components(output.hidden_states[self.pca_layer][0].cpu())
        for number, column in enumerate(components.T, 1):
            for position in places:
                # Components of different texts are different directions: they are not to be pooled.
                settings = {"position": position, "layer": self.pca_layer, **sample.identity}
                yield Measurement(f"component_{number}", column[position].item(), settings=settings)
