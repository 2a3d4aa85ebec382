"""The model while it learns: quantised base, stretched positions, attention, LoRA, chunked loss."""

import tempfile
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..convert import convert_model
from ..errors import LongpatchError
from ..interpolation import interpolate_rope
from ..models import DEMO_FOLDER, load_model
from .config import TrainConfig
from .loss import chunk_loss
from .sections import LoraSection
from .shifted import shift_attention


def prepare_model(config: TrainConfig) -> tuple[PeftModel, Any]:
    """`(model, tokenizer)` ready for the Trainer, as `config` asks for."""
    section = config.model
    model, tokenizer = load_quantized(section.name, section.quantization, getattr(torch, section.dtype))
    if config.rope.arguments():
        interpolate_rope(model, **config.rope.arguments())
    if section.attention == "lambda":
        convert_model(model, section.local_branch, section.global_branch)
    elif section.attention == "shifted":
        shift_attention(model, section.group)
    if section.quantization != "none":
        checkpointing = bool(config.training.get("gradient_checkpointing"))
        model = prepare_model_for_kbit_training(
            model, checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    peft_model: Any = get_peft_model(model, lora_config(model, config.lora))
    peft_model.config.use_cache = False
    chunk_loss(peft_model, section.loss_chunk, config.data.prompt_grad)
    return peft_model, tokenizer


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """ "nf4" with double quantisation (QLoRA, arXiv 2305.14314), "int8", or None for "none"."""
    if kind == "none":
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_quantized(name: str, quantization: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """`load_model`, quantised while it loads. A model that comes as GGUF is unpacked first."""
    quantized = quantization_config(quantization, dtype)
    if quantized is None:
        return load_model(name, dtype)
    if name == "smollm2" or name.endswith(".gguf"):
        model, tokenizer = load_model(name, dtype)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return _from_folder(folder, quantized, dtype), tokenizer
    folder = str(DEMO_FOLDER) if name == "demo" else name
    return _from_folder(folder, quantized, dtype), AutoTokenizer.from_pretrained(folder)


def _from_folder(folder: str, quantized: BitsAndBytesConfig, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantized, dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError, ImportError) as error:
        reason = f"{folder!r} does not load quantised: {str(error).strip().splitlines()[0]}"
        raise LongpatchError("train", [reason], "a folder or hub name; pip install 'longpatch[qlora]'") from error


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
