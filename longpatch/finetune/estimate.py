"""Peak memory of a training run by length, from the configuration alone: no weight is loaded.

The model is built on PyTorch's meta device, where tensors have shapes and no memory. One forward there tells how many
bytes autograd keeps for the backward pass, for this architecture with this LoRA; the rest is arithmetic.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from ..models import DEMO_FOLDER, smollm2_file
from .config import TrainConfig
from .loss import chunk_loss
from .model import lora_config

NAME = "longpatch_estimate"
PROBES = (64, 128)  # tokens; what is kept grows linearly with them
# Bytes per number: 4 bits and, for each 64, one byte of scale, whose own scale is 4 bytes for each 256 (QLoRA, sec. 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER_BYTES = {"8bit": 2, "adafactor": 0.1, "sgd": 0, "adamw": 8, "adam": 8}


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of one training step on rows of `length` tokens."""

    length: int
    weights: float
    learned: float  # weights that learn, their gradients, the optimiser's state
    activations: float  # kept for the backward pass
    layer: float  # one layer's gradients, and where it is computed anew its activations
    loss: float  # logits of a chunk and their gradients; they are gone before the first layer's backward pass

    @property
    def total(self) -> float:
        return self.weights + self.learned + self.activations + max(self.layer, self.loss)


def estimate(config: TrainConfig, lengths: list[int] | None = None) -> list[Estimate]:
    """Estimates for `lengths` in tokens; by default powers of two up to the configured length, and that length."""
    shape = model_shape(config.model.name)
    quantised, other = _count(shape, config.model.quantization)
    compute = 2 if config.training.get("bf16") or config.training.get("fp16") else _bytes(config.model.dtype)
    linear = {"nf4": NF4_BYTES, "int8": 1.0, "none": _bytes(config.model.dtype)}[config.model.quantization]
    plain = 4 if config.model.quantization != "none" else _bytes(config.model.dtype)  # peft keeps them in float32
    weights = quantised * linear + other * plain
    batch = config.training.get("per_device_train_batch_size", 8)
    learned_numbers, kept, layer = _probe(shape, config, compute)
    optimizer = str(config.training.get("optim", "adamw_torch"))
    state = next((size for name, size in OPTIMIZER_BYTES.items() if name in optimizer), 8)
    vocabulary = shape.get_text_config(decoder=True).vocab_size
    if lengths is None:
        lengths = [length for length in (2**n for n in range(10, 30)) if length < config.data.length]
        lengths.append(config.data.length)
    return [
        Estimate(
            length,
            weights,
            learned_numbers * (8 + state),
            batch * length * kept,
            batch * length * layer,
            # Logits of a chunk, in the dtype of computation and in float32, and as many gradients of either.
            min(config.model.loss_chunk, batch * length) * vocabulary * 2 * (4 + compute),
        )
        for length in lengths
    ]


def table(config: TrainConfig) -> str:
    """The estimates as text, in GiB."""
    columns = ("length", "weights", "learned", "activations", "layer", "loss", "total")
    lines = ["".join(f"{column:>13}" for column in columns) + "   GiB, one device"]
    for row in estimate(config):
        sizes = (row.weights, row.learned, row.activations, row.layer, row.loss, row.total)
        lines.append(f"{row.length:>13,}" + "".join(f"{size / 2**30:>13.3f}" for size in sizes))
    return "\n".join(lines)


def model_shape(name: str) -> Any:
    """The config of MODEL, without its weights."""
    if name == "smollm2" or name.endswith(".gguf"):
        path = smollm2_file() if name == "smollm2" else Path(name)
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    return AutoConfig.from_pretrained(str(DEMO_FOLDER) if name == "demo" else name)


def _bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _empty(shape: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=torch.float32)


def _count(shape: Any, quantization: str) -> tuple[int, int]:
    """Numbers in matrices that are quantised (or would be), and all others."""
    model = _empty(shape)
    head = model.get_output_embeddings()
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    quantised = sum(weight.numel() for weight in linear)
    return quantised, sum(parameter.numel() for parameter in model.parameters()) - quantised


def _probe(shape: Any, config: TrainConfig, compute: int) -> tuple[int, float, float]:
    """Numbers that learn; bytes kept a token; bytes a token that one layer's backward pass takes on top."""
    counts = []
    for layers in (1, 2):
        small = copy.deepcopy(shape)
        text = small.get_text_config(decoder=True)
        total = text.num_hidden_layers
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        model = _empty(small)
        peft_model = get_peft_model(model, lora_config(model, config.lora)).to("meta")
        AttentionInterface.register(NAME, _attend)
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if "layer_idx" in vars(module):
                module.keeps_repeated = config.model.attention == "shifted"
        chunk_loss(peft_model, config.model.loss_chunk)
        kept = [_kept(peft_model.train(), length) for length in PROBES]
        slope = (kept[1] - kept[0]) / (PROBES[1] - PROBES[0]) * compute / 4
        learned = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
        counts.append((learned, slope))
    (first_learned, first), (second_learned, second) = counts
    layer, learned = second - first, first_learned + (total - 1) * (second_learned - first_learned)
    hidden = text.hidden_size * compute
    if config.training.get("gradient_checkpointing"):
        return learned, total * hidden + (first - layer), 1.5 * layer
    return learned, first + (total - 1) * layer, layer / 2


def _kept(model: Any, length: int) -> int:
    """Bytes of activations that autograd keeps for the backward pass of `length` tokens, each storage once."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_base_model().base_model(input_ids=ids, use_cache=False)[0]
    total = sum(storage.nbytes() for storage in storages.values())
    del hidden
    return total


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, output; of shifted attention, cut into groups."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.clone()
        ctx.save_for_backward(query, key, value, out)
        return out


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    if module.keeps_repeated:
        repeats = query.shape[1] // key.shape[1]
        query, key, value = query.clone(), key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None
