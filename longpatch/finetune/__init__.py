"""Teach a model to read further: QLoRA on long text, on the Trainer of transformers, peft and bitsandbytes."""

from .config import TrainConfig, read_config

__all__ = ["TrainConfig", "read_config"]
