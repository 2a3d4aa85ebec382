"""What the Trainer makes of rows: their order, their lengths, streams, and the loss on rows that are not trained."""

import json
import shutil

import pytest
import torch

from longpatch import LongpatchError
from longpatch.data import load_rows, pad_right
from longpatch.finetune import read_config, train
from longpatch.models import load_model
from tests.processes import ACCELERATE
from tests.test_train import finished, longpatch_train, losses, write_base, write_config

PLAIN = {"lora": {"dropout": 0.0}, "model": {"attention": "full"}}
RAPID = {"save_strategy": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and texts of up to 64 times a few tokens in no order of length."""
    folder = tmp_path_factory.mktemp("rows")
    write_base(folder)
    texts = [f"{i} " + " night" * (29 * i % 64) for i in range(64)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def batches(monkeypatch):
    """Lengths of the rows in each batch that was made."""
    seen = []

    def collate(rows):
        seen.append([len(row["input_ids"]) for row in rows])
        return pad_right(rows)

    monkeypatch.setattr("longpatch.finetune.run.pad_right", collate)
    return seen


def test_rows_of_one_length_come_together_and_none_is_too_short_or_too_long(folder, batches):
    data = {"train": str(folder / "texts.jsonl"), "pack": False, "bos": False, "min_length": 10, "length": 50}
    padding = {}
    for strategy in ("random", "group_by_length"):
        training = RAPID | {"train_sampling_strategy": strategy, "num_train_epochs": 1}
        output = train(read_config(write_config(folder, strategy, -1, data=data, training=training, **PLAIN)))
        lengths = [length for batch in batches for length in batch]
        assert (min(lengths), max(lengths)) == (10, 50)
        assert 40 < len(lengths) < 60
        assert losses(output)[-1] < losses(output)[0]
        padding[strategy] = sum(max(batch) - min(batch) for batch in batches)
        batches.clear()
    assert 3 * padding["group_by_length"] < padding["random"]


def test_rows_that_are_not_trained_are_measured_with_full_attention(folder):
    data = {"train": str(folder / "texts.jsonl[2]"), "validation": str(folder / "texts.jsonl[9]")}
    data |= {"pack": False, "length": 64, "min_length": 5}
    training = RAPID | {"eval_strategy": "steps", "eval_steps": 2}
    config = read_config(write_config(folder, "measured", batch=1, data=data, training=training))
    output = train(config)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    measured = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert list(measured) == [2, 4, 6]
    assert measured[6] < measured[2]
    model, tokenizer = load_model(str(output))
    with torch.no_grad():
        rows = load_rows(config.data.validation, config.data, tokenizer)
        expected = [model(**pad_right([row])).loss.item() for row in rows]
    assert measured[6] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_validation_is_both_given_and_asked_for(folder):
    for data, training, reason in (
        ({"validation": str(folder / "book.txt")}, {}, "data.validation is read where training.eval_strategy says"),
        ({}, {"eval_strategy": "steps"}, "training.eval_strategy='steps' needs data.validation"),
    ):
        with pytest.raises(LongpatchError, match=reason):
            read_config(write_config(folder, "wrong", data=data, training=training))


@pytest.mark.parametrize("pack", [True, False])
def test_a_stream_is_the_rows_in_order_and_goes_on_where_it_stopped(folder, pack):
    curves = []
    for streaming in (False, True):
        data = {"train": str(folder / "texts.jsonl"), "length": 48, "pack": pack, "streaming": streaming}
        training = {} if streaming else {"train_sampling_strategy": "sequential"}
        config = read_config(
            write_config(folder, f"{pack}-{streaming}", 4, data=data, training=training | {"save_steps": 2}, **PLAIN)
        )
        output = train(config)
        curves.append(losses(output))
    assert curves[0] == curves[1]
    shutil.rmtree(output / "checkpoint-4")
    train(config, resume=True)
    assert losses(output) == curves[1]


@pytest.mark.slow
def test_two_processes_share_a_stream_of_rows_of_all_lengths(folder):
    data = {"train": str(folder / "texts.jsonl"), "length": 48, "pack": False, "streaming": True}
    one, two = (write_config(folder, f"stream-{batch}", 4, batch=batch, data=data, **PLAIN) for batch in (2, 1))
    process = longpatch_train(two, launcher=[*ACCELERATE, "-m", "longpatch.cli"])
    train(read_config(one))
    finished(process)
    torch.testing.assert_close(losses(folder / "stream-1"), losses(folder / "stream-2"), atol=1e-5, rtol=0)
