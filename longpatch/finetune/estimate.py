"""Peak memory of a training run by length, from the configuration alone: no weight is loaded.

The model is built of tensors that have shapes and no memory. One forward of them tells how many bytes autograd keeps
for the backward pass, for this architecture with this LoRA in these dtypes; the rest is arithmetic.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from ..models import DEMO_FOLDER, smollm2_file
from .config import TrainConfig
from .model import learn_in_float32, lora_config

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
    mixed = mixed_dtype(config)
    plain = _bytes(config.model.dtype)
    compute = mixed.itemsize if mixed else plain
    linear = {"nf4": NF4_BYTES, "int8": 1.0, "none": plain}[config.model.quantization]
    weights = quantised * linear + other * plain
    batch = config.training.get("per_device_train_batch_size", 8)
    learned_numbers, kept, layer = _probe(shape, config, mixed)
    optimizer = str(config.training.get("optim", "adamw_torch"))
    state = next((size for name, size in OPTIMIZER_BYTES.items() if name in optimizer), 8)
    text = shape.get_text_config(decoder=True)
    # The head, for a chunk; logits in the dtype of computation and in float32, and as many gradients of either.
    head = text.hidden_size * compute if mixed and plain == 4 else 0
    logits = 2 * (4 + compute)
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
            text.vocab_size * (head + logits * min(config.model.loss_chunk, batch * length)),
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


def mixed_dtype(config: TrainConfig) -> torch.dtype | None:
    """What the Trainer's autocast computes in; None: there is none."""
    if config.training.get("bf16"):
        return torch.bfloat16
    return torch.float16 if config.training.get("fp16") else None


def model_shape(name: str) -> Any:
    """The config of MODEL, without its weights."""
    if name == "smollm2" or name.endswith(".gguf"):
        path = smollm2_file() if name == "smollm2" else Path(name)
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    return AutoConfig.from_pretrained(str(DEMO_FOLDER) if name == "demo" else name)


def _bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _empty(shape: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=dtype)


def _count(shape: Any, quantization: str) -> tuple[int, int]:
    """Numbers in matrices that are quantised (or would be), and all others."""
    model = _empty(shape, torch.float32)
    head = model.get_output_embeddings()
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    quantised = sum(weight.numel() for weight in linear)
    return quantised, sum(parameter.numel() for parameter in model.parameters()) - quantised


def _probe(shape: Any, config: TrainConfig, mixed: torch.dtype | None) -> tuple[int, float, float]:
    """Numbers that learn; bytes kept a token; bytes a token that one layer's backward pass takes on top."""
    counts = []
    for layers in (1, 2):
        small = copy.deepcopy(shape)
        text = small.get_text_config(decoder=True)
        total = text.num_hidden_layers
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        peft_model = _learner(small, config)
        with FakeTensorMode(), torch.autocast("cpu", mixed) if mixed else nullcontext():
            _fake(peft_model)
            (short, less), (long, more) = (_kept(peft_model, length) for length in PROBES)
        slope, hidden = ((b - a) / (PROBES[1] - PROBES[0]) for a, b in ((short, long), (less, more)))
        learned = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
        counts.append((learned, slope))
    (first_learned, first), (second_learned, second) = counts
    layer, learned = second - first, first_learned + (total - 1) * (second_learned - first_learned)
    if config.training.get("gradient_checkpointing"):
        return learned, total * hidden + (first - layer), 1.5 * layer
    return learned, first + (total - 1) * layer, layer / 2


def _learner(shape: Any, config: TrainConfig) -> Any:
    """The model as `prepare_model` makes it, as far as memory goes."""
    quantised = config.model.quantization != "none"
    dtype = getattr(torch, config.model.dtype)
    model = _empty(shape, dtype)
    head = model.get_output_embeddings()
    for module in model.modules():
        if quantised and isinstance(module, nn.Linear) and module is not head:
            module.forward = partial(_Quantised.apply, module.out_features)
        if "layer_idx" in vars(module):
            vars(module)["keeps_repeated"] = config.model.attention == "shifted"
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)
    peft_model = get_peft_model(model, lora_config(model, config.lora)).to("meta")
    learn_in_float32(peft_model, dtype)
    return peft_model.train()


def _fake(model: Any) -> None:
    """From the meta device to fake tensors on the CPU, for which autocast does what it does."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    learns = held is module._parameters
                    held[name] = nn.Parameter(fake, tensor.requires_grad) if learns else fake


def _kept(model: Any, length: int) -> tuple[int, int]:
    """Bytes that autograd keeps of `length` tokens, each storage once; bytes of their last hidden states."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_base_model().base_model(input_ids=ids, use_cache=False)[0]
    return sum(storage.nbytes() for storage in storages.values()), hidden.nbytes


class _Quantised(torch.autograd.Function):
    """A linear module in few bits: it keeps nothing, and answers in the dtype of what comes in."""

    @staticmethod
    def forward(ctx: Any, out_features: int, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:-1], out_features)


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, output; of shifted attention, cut into groups."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.clone()
        ctx.save_for_backward(query, key, value, out)
        return out


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
    if module.keeps_repeated:
        repeats = query.shape[1] // key.shape[1]
        query, key, value = query.clone(), key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None
