"""A training run from a YAML file: it learns, stops, goes on, and leaves an adapter that needs nothing else said."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from longpatch import LongpatchError
from longpatch.adapter import _fetched, load_adapter, read_record
from longpatch.cli import main
from longpatch.demo import load
from longpatch.finetune import read_config, train
from longpatch.finetune.run import last_checkpoint
from longpatch.models import load_model
from tests.processes import ACCELERATE, environment
from tests.tiny import tiny_llama

WORDS = "It was a dark and stormy night, and the rain fell in torrents on the roofs of the town. "


def write_base(folder):
    """A tiny Llama with the demo's tokenizer, and a book to read."""
    # quantised layers work on blocks of 64
    tiny_llama(vocab_size=4096, initializer_range=0.05, intermediate_size=128).save_pretrained(folder / "base")
    load()[1].save_pretrained(folder / "base")
    (folder / "book.txt").write_text("".join(f"{i} {WORDS}" for i in range(120)))


def write_config(folder, output="run", steps=6, batch=2, **sections):
    config = {
        "model": {"name": str(folder / "base"), "attention": "shifted", "loss_chunk": 48},
        "rope": {"method": "linear", "target_length": 128},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "norms": True},
        "data": {"train": str(folder / "book.txt"), "length": 96, "bos": True},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "output": str(folder / output),
    }
    for section, values in sections.items():
        config[section] = config[section] | values
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def losses(output):
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def longpatch_train(config, *arguments, launcher=("-m", "longpatch.cli")):
    """The command in a process of its own."""
    command = [sys.executable, *launcher, "train", str(config), *arguments]
    one_thread = environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base model, the book, and one undisturbed run of six steps."""
    folder = tmp_path_factory.mktemp("training")
    write_base(folder)
    train(read_config(write_config(folder)))
    return folder


def test_it_learns_and_the_adapter_says_what_it_needs(folder):
    curve = losses(folder / "run")
    assert len(curve) == 6
    assert curve[-1] < curve[0] - 0.3
    base, _ = load_model(str(folder / "base"))
    model, tokenizer = load_model(str(folder / "run"))
    config = model.get_base_model().config
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.max_position_embeddings == 128
    ids = torch.tensor([tokenizer.encode(WORDS * 4)[:96]])
    with torch.no_grad():
        trained, plain = (each(input_ids=ids, labels=ids).loss for each in (model, base))
    assert trained < plain - 0.3
    norms = {name for name, p in model.named_parameters() if "norm" in name and "modules_to_save" in name}
    assert len(norms) == 5


def copy_without(run, copy, part):
    """An adapter as `run` has it, but for the first weight with `part` in its name."""
    from safetensors.torch import load_file, save_file

    for name in ("adapter_config.json", "longpatch.json"):
        (copy / name).write_text((run / name).read_text())
    weights = load_file(run / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if part in name))
    save_file(weights, copy / "adapter_model.safetensors")


def test_a_lost_norm_is_not_forgotten_silently(folder, tmp_path):
    copy_without(folder / "run", tmp_path, "layers.1.input_layernorm")
    base, _ = load_model(str(folder / "base"))
    with pytest.raises(LongpatchError, match=r"lacks the trained model.layers.1.input_layernorm"):
        load_adapter(base, tmp_path)
    assert base.config.rope_parameters["rope_type"] == "default"


def test_a_lost_lora_weight_is_not_forgotten_silently(folder, tmp_path):
    copy_without(folder / "run", tmp_path, "layers.1.mlp.up_proj.lora_B")
    base, tokenizer = load_model(str(folder / "base"))
    ids = torch.tensor([tokenizer.encode(WORDS)])
    before = base(ids).logits
    with pytest.raises(LongpatchError, match=r"lacks the trained model.layers.1.mlp.up_proj.lora_B"):
        load_adapter(base, tmp_path)
    assert base.config.rope_parameters["rope_type"] == "default"
    assert torch.equal(base(ids).logits, before)


def test_an_adapter_of_the_hub_is_stretched_and_checked_as_a_folder_is(folder, monkeypatch):
    def fetch(name, allow_patterns):
        assert name == "user/adapter"
        assert "longpatch.json" in allow_patterns
        return str(folder / "run")

    found = {"user/adapter": "adapter_config.json"}
    monkeypatch.setattr("longpatch.adapter.find_adapter_config_file", found.get)
    monkeypatch.setattr("longpatch.adapter.snapshot_download", fetch)
    _fetched.cache_clear()
    expected, tokenizer = load_model(str(folder / "run"))
    ids = torch.tensor([tokenizer.encode(WORDS)])
    for model, _ in (load_model("user/adapter"), load_model(str(folder / "base"), adapter="user/adapter")):
        assert model.get_base_model().config.rope_parameters["rope_type"] == "linear"
        assert torch.equal(model(ids).logits, expected(ids).logits)
    with pytest.raises(LongpatchError, match=r"user/other holds no adapter_config.json"):
        load_adapter(load_model(str(folder / "base"))[0], "user/other")
    _fetched.cache_clear()


def test_an_adapter_is_no_base_to_train_on(folder):
    config = write_config(folder, "second", model={"name": str(folder / "run")})
    with pytest.raises(LongpatchError, match=r"run' is an adapter; `longpatch merge`"):
        read_config(config)
    assert main(["train", "--estimate", str(config)]) == 2


def test_several_gpus_need_a_process_each(folder, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    with pytest.raises(LongpatchError, match=r"2 GPUs are visible to one process.*accelerate launch"):
        train(read_config(write_config(folder, "gpus")))


def test_a_killed_run_goes_on_with_the_same_losses(folder):
    config = write_config(folder, "killed", steps=6)
    process = longpatch_train(config)
    while last_checkpoint(str(folder / "killed")) != str(folder / "killed" / "checkpoint-4"):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "killed" / "adapter_model.safetensors").exists()
    # One that is whole but for our record is one, since older ones may be gone; one that the kill cut short is none.
    (folder / "killed" / "checkpoint-4" / "longpatch.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "killed" / "checkpoint-2")
    cut_short = folder / "killed" / "checkpoint-5"
    cut_short.mkdir(exist_ok=True)
    (cut_short / "trainer_state.json").write_text('{"global_')
    assert "killed/checkpoint-4" in finished(longpatch_train(config, "--resume"))
    assert losses(folder / "killed") == losses(folder / "run")


def test_two_processes_have_the_losses_of_one(folder):
    two = write_config(folder, "two", batch=1, lora={"dropout": 0.0})
    one = write_config(folder, "one", batch=2, lora={"dropout": 0.0})
    process = longpatch_train(two, launcher=[*ACCELERATE, "-m", "longpatch.cli"])
    train(read_config(one))
    finished(process)
    torch.testing.assert_close(losses(folder / "two"), losses(folder / "one"), atol=1e-5, rtol=0)


def test_a_prompt_without_gradient_trains_the_answer_alone(folder):
    rows = [{"input": WORDS * 2, "output": f"Number {i}."} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = []
    for prompt_grad in (True, False):
        sections = {
            "model": {"attention": "full"},
            "lora": {"dropout": 0.0},
            "data": {"train": str(folder / "rows.jsonl"), "pack": False, "bos": False, "prompt_grad": prompt_grad},
            "training": {"save_strategy": "no"},
        }
        train(read_config(write_config(folder, f"prompt-{prompt_grad}", steps=3, batch=1, **sections)))
        curves.append(losses(folder / f"prompt-{prompt_grad}"))
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-4)  # the same losses,
    assert curves[0][2] != pytest.approx(curves[1][2], abs=1e-4)  # other gradients,
    assert curves[1][2] < curves[1][0]  # that teach


def test_a_stream_trains_and_is_counted_as_far_as_it_was_read(folder, capsys):
    data = {"streaming": True, "pack": False, "train": str(folder / "texts.jsonl"), "length": 64}
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} {WORDS}"}) + "\n" for i in range(1000)))
    config = write_config(folder, "stream", steps=4, data=data)
    output = train(read_config(config))
    assert losses(output)[-1] < losses(output)[0]
    (kept,) = read_record(output)["data"]
    assert 8 <= kept["documents"] < 100
    assert kept["tokens"] == kept["trained"] > 8 * 20
    (at_two,) = read_record(output / "checkpoint-2")["data"]
    assert 4 <= at_two["documents"] < kept["documents"]
    assert f"{kept['documents']:>12}" in capsys.readouterr().out
    with pytest.raises(LongpatchError, match=r"no training\.dataloader_num_workers"):
        read_config(config, ["training.dataloader_num_workers=1"])


def test_rows_become_a_token_file_that_trains(folder):
    (folder / "some.jsonl").write_text("".join(json.dumps({"text": f"{i} {WORDS}"}) + "\n" for i in range(150)))
    out = folder / "some.bin"
    assert main(["tokenize", str(folder / "base"), str(folder / "some.jsonl"), str(out), "--workers", "1"]) == 0
    curves = []
    for name in ("some.bin", "some.jsonl"):
        data = {"data_root": str(folder), "train": name, "bos": False}
        output = train(read_config(write_config(folder, f"from-{name}", steps=4, data=data)))
        curves.append(losses(output))
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0] - 0.1


def test_wrong_rows_stop_a_run_before_its_model_is_loaded(folder, monkeypatch):
    (folder / "wrong.jsonl").write_text("[]\n")
    monkeypatch.setattr("longpatch.finetune.run.prepare_model", lambda config: pytest.fail("the model was loaded"))
    with pytest.raises(LongpatchError, match=r"wrong.jsonl:1 is not a JSON object"):
        train(read_config(write_config(folder, "wrong", data={"train": str(folder / "wrong.jsonl")})))
    assert not (folder / "wrong").exists()
