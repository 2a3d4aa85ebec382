"""The model while it learns: quantised base, stretched positions, attention, LoRA, chunked loss."""

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ..convert import convert_model
from ..errors import LongpatchError
from ..interpolation import interpolate_rope
from ..models import load_model
from ..packing import unpack
from .config import TrainConfig
from .loss import chunk_loss
from .sections import LoraSection
from .shifted import shift_attention


def prepare_model(config: TrainConfig) -> tuple[PeftModel, Any]:
    """`(model, tokenizer)` ready for the Trainer, as `config` asks for."""
    section = config.model
    model, tokenizer = load_model(section.name, getattr(torch, section.dtype), quantization=section.quantization)
    if isinstance(model, PeftModel):
        raise LongpatchError(
            "train", [f"model.name={section.name!r} is an adapter"], "what `longpatch merge` makes of it"
        )
    if config.rope.arguments():
        interpolate_rope(model, **config.rope.arguments())
    if section.attention == "lambda":
        convert_model(model, section.local_branch, section.global_branch)
    elif section.attention == "shifted":
        shift_attention(model, section.group)
    unpack(model)  # an evaluation during training would pack it
    peft_model: Any = get_peft_model(model, lora_config(model, config.lora))
    learn_in_float32(peft_model, getattr(torch, section.dtype))
    peft_model.config.use_cache = False
    chunk_loss(peft_model, section.loss_chunk, config.data.prompt_grad)
    return peft_model, tokenizer


def learn_in_float32(peft_model: Any, dtype: torch.dtype) -> None:
    """Embeddings and norms too: a step of the optimiser is less than what 16 bits can tell apart.

    They answer in `dtype` all the same, and so do those that rest: what goes from layer to layer, and is kept at each
    checkpoint, takes the widest dtype that is added to it, and weights in few bits answer in the dtype they are given.
    """
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if dtype != torch.float32:
        for module in peft_model.modules():
            if is_norm(module) or isinstance(module, nn.Embedding):
                module.register_forward_hook(partial(_answer_in, dtype))


def _answer_in(dtype: torch.dtype, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def lora_config(model: Any, section: LoraSection) -> LoraConfig:
    """peft's configuration; embeddings and norms, where they learn, are among its `modules_to_save`."""
    full: set[str] = set()
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    if section.embeddings:
        full.add(names[id(model.get_input_embeddings())])
    if section.norms:
        full |= {names[id(module)] for module in model.modules() if is_norm(module)}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.targets,
        modules_to_save=sorted(full) or None,
        ensure_weight_tying=section.embeddings and tied,
    )


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and any(True for _ in module.parameters(recurse=False))
