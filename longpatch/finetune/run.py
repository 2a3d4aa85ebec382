"""One training run, on the Trainer of transformers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..adapter import write_record
from ..convert import unwrap
from ..data import Rows, StreamedRows, load_rows, pad_right
from ..data.counts import table
from ..errors import LongpatchError
from ..models import load_tokenizer
from .config import TrainConfig
from .model import prepare_model


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train as `config` says; returns the folder that holds the adapter.

    Args:
        resume: go on from the newest checkpoint in `config.output`, where there is one.

    Raises:
        LongpatchError: for arguments that the Trainer does not take, data that cannot be read, a model that cannot be
            prepared, and one process with several GPUs.
    """
    arguments = training_arguments(config)
    if arguments.n_gpu > 1:  # the Trainer would copy the model, and a copy's chunked loss would be that of the first
        reason = f"{arguments.n_gpu} GPUs are visible to one process"
        raise LongpatchError("train", [reason], "accelerate launch, with a process for each, or CUDA_VISIBLE_DEVICES=0")
    set_seed(arguments.seed)
    data, tokenizer = config.data, load_tokenizer(config.model.name)
    rows = load_rows(data.train, data, tokenizer, streaming=data.streaming)
    validation = None if data.validation is None else load_rows(data.validation, data, tokenizer)
    if rows.counts and not data.streaming:
        print(table(rows.counts))
    model, _ = prepare_model(config)
    record = adapter_record(config, model)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=pad_right,
        callbacks=[RecordWriter(record, rows)],
    )
    last = last_checkpoint(config.output) if resume else None
    if resume and trainer.is_world_process_zero():
        print(f"going on from {last}" if last else f"no whole checkpoint in {config.output}: from the first step")
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(config.output)
    trainer.save_state()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(config.output)
        write_record(config.output, record | data_record(rows))
        if data.streaming and rows.counts:
            print(table(rows.counts))
    return Path(config.output)


def last_checkpoint(output: str) -> str | None:
    """The newest whole checkpoint: trainer_state.json is what is written last, before older ones are deleted."""
    folders = sorted(Path(output).glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return next((str(folder) for folder in reversed(folders) if _is_whole(folder)), None)


def _is_whole(folder: Path) -> bool:
    try:
        return "global_step" in json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The `training` section as transformers reads it, with defaults that a long row needs."""
    defaults = {
        "report_to": "none",
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
        "per_device_eval_batch_size": config.training.get("per_device_train_batch_size", 8),
    }
    if config.training.get("gradient_checkpointing"):
        defaults["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if config.data.streaming:  # each process reads all and takes its own: one that hands out needs rows of one length
        defaults["accelerator_config"] = {"dispatch_batches": False}
    try:
        return TrainingArguments(output_dir=config.output, remove_unused_columns=False, **(defaults | config.training))
    except (TypeError, ValueError, ImportError) as error:
        raise LongpatchError("train", [f"training: {' '.join(str(error).split())}"]) from error


def adapter_record(config: TrainConfig, model: Any) -> dict[str, Any]:
    """What `longpatch.json` holds: the base model's name, and the interpolation its positions need."""
    marker = getattr(unwrap(model).config.get_text_config(decoder=True), "longpatch_rope", None)
    return {
        "base": config.model.name,
        "rope": None if marker is None else marker["settings"],
        "length": config.data.length,
        "attention": config.model.attention,
        "quantization": config.model.quantization,
    }


def data_record(rows: Rows | StreamedRows) -> dict[str, Any]:
    """What became of each source: of a stream, as far as it was read."""
    return {"data": [asdict(count) for count in rows.counts]}


class RecordWriter(TrainerCallback):
    """Writes `longpatch.json` into each checkpoint."""

    def __init__(self, record: dict[str, Any], rows: Rows | StreamedRows):
        self.record, self.rows = record, rows

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_record(folder, self.record | data_record(self.rows))
