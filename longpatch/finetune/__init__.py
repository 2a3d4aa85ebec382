"""Teach a model to read further: QLoRA on long text, on the Trainer of transformers, peft and bitsandbytes."""

from ..adapter import load_adapter
from .config import TrainConfig, read_config

__all__ = ["TrainConfig", "load_adapter", "read_config", "train"]


def train(config: TrainConfig, resume: bool = False):
    """`longpatch train`: see `longpatch.finetune.run.train`, which this imports when it is called."""
    from .run import train as run

    return run(config, resume)
