"""Checkpoints: a run that was cut off goes on as if nothing had happened."""

import pytest
import torch

from longpatch import LongpatchError, TempLoraGenerator
from longpatch.evaluation.temp_lora import Walk, walk_document
from longpatch.temp_lora import LearnOptions
from longpatch.temp_lora.checkpoint import layer_devices, load_state
from longpatch.temp_lora.saved import KIND
from tests.test_temp_lora_generator import GREEDY, LEARN, StopAt, model_with_end, padded
from tests.tiny import random_ids, tiny_llama


class Killed(BaseException):
    pass


class KillAt(StopAt):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.length:
            raise Killed
        return super().__call__(input_ids, scores) & False


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("at", [5, 23])
@pytest.mark.parametrize("extra", [{}, {"cache_reuse_chunks": 3}, {"learn_prompt": True, "chunk_tokens": 5}], ids=str)
def test_a_run_that_was_cut_off_ends_with_the_same_tokens(converted, at, extra, tmp_path):
    ids, mask = padded()
    if "learn_prompt" in extra:
        ids, mask = random_ids(3, 12), torch.ones_like(ids)
    eos = int(model_with_end().generate(ids[:1], max_new_tokens=30, do_sample=False)[0, 30])
    settings = {"chunk_tokens": 7, "context_tokens": 20} | LEARN | {"dropout": 0.1} | extra
    sampling = {"attention_mask": mask, "do_sample": True, "top_k": 5, "max_new_tokens": 40, "eos_token_id": eos}
    torch.manual_seed(5)
    expected = TempLoraGenerator(model_with_end(converted=converted), **settings).generate(ids, **sampling)
    torch.manual_seed(5)
    cut = TempLoraGenerator(model_with_end(converted=converted), checkpoint_dir=tmp_path, **settings)
    with pytest.raises(Killed):
        cut.generate(ids, stopping_criteria=[KillAt(at + 12)], **sampling)
    torch.manual_seed(99)
    with pytest.raises(LongpatchError, match="stopping_criteria is missing"):
        TempLoraGenerator.resume(tmp_path, model_with_end(converted=converted))
    again = TempLoraGenerator.resume(tmp_path, model_with_end(converted=converted), stopping_criteria=[StopAt(10**9)])
    assert torch.equal(again, expected)


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    model, ids = model_with_end(), random_ids(1, 9)
    TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, checkpoint_dir=tmp_path, **LEARN).generate(
        ids, **GREEDY
    )
    with pytest.raises(LongpatchError, match="another model"):
        TempLoraGenerator.resume(tmp_path, tiny_llama(seed=1, max_position_embeddings=512))
    with pytest.raises(LongpatchError, match="converted differently"):
        TempLoraGenerator.resume(tmp_path, model_with_end(converted=True))
    with pytest.raises(LongpatchError, match="no checkpoint"):
        TempLoraGenerator.resume(tmp_path / "nowhere", model)
    path = tmp_path / "state.safetensors"
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:-5] + bytes(255 - byte for byte in whole[-5:]),
        b"",
        whole[:40] + b"?" + whole[41:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(LongpatchError, match="damaged"):
            TempLoraGenerator.resume(tmp_path, model)


SETTINGS = {"chunk_tokens": 7, "context_tokens": 20} | LEARN


def cut_off(folder, ids, *lengths, converted=False, **arguments):
    """A run that was killed at each of `lengths`, and gone on with each time."""
    with pytest.raises(Killed):
        TempLoraGenerator(model_with_end(converted=converted), checkpoint_dir=folder, **SETTINGS).generate(
            ids, stopping_criteria=[KillAt(lengths[0])], **arguments
        )
    for length in lengths[1:]:
        with pytest.raises(Killed):
            TempLoraGenerator.resume(folder, model_with_end(converted=converted), stopping_criteria=[KillAt(length)])
    return TempLoraGenerator.resume(folder, model_with_end(converted=converted), stopping_criteria=[StopAt(10**9)])


@pytest.mark.parametrize("converted", [False, True])
def test_a_long_prompt_is_seen_as_before_when_the_first_chunk_was_cut_off(converted, tmp_path):
    ids = random_ids(1, 50)
    expected = TempLoraGenerator(model_with_end(converted=converted), **SETTINGS).generate(ids, **GREEDY)
    assert torch.equal(cut_off(tmp_path, ids, 53, converted=converted, **GREEDY), expected)


COUNTED = [
    {"exponential_decay_length_penalty": (10, 1.1), "eos_token_id": 5},
    {"begin_suppress_tokens": list(range(1, 97, 2))},
    {"begin_suppress_tokens": list(range(2, 97, 2))},
    {"sequence_bias": {(5,): -3.0, (7, 8): 9.0}},
    {"min_new_tokens": 35, "eos_token_id": list(range(1, 90))},
    {"do_sample": True, "num_return_sequences": 3},
]


@pytest.mark.parametrize("settings", COUNTED, ids=lambda settings: next(iter(settings)))
def test_settings_that_count_from_the_prompt_are_kept(settings, tmp_path):
    ids, settings = random_ids(1, 9), GREEDY | {"top_k": 5} | settings
    torch.manual_seed(2)
    expected = TempLoraGenerator(model_with_end(), **SETTINGS).generate(ids, **settings)
    assert expected.shape[1] == 30 or "exponential_decay_length_penalty" not in settings  # it ends early
    torch.manual_seed(2)
    assert torch.equal(cut_off(tmp_path, ids, 12, 20, 28, **settings), expected)


def test_time_that_was_used_counts_once(tmp_path, monkeypatch):
    import transformers.generation.utils as utils

    given, original = [], utils.MaxTimeCriteria
    monkeypatch.setattr(utils, "MaxTimeCriteria", lambda max_time: given.append(max_time) or original(max_time))
    used = []
    with pytest.raises(Killed):
        TempLoraGenerator(model_with_end(), checkpoint_dir=tmp_path, **SETTINGS).generate(
            random_ids(1, 9), stopping_criteria=[KillAt(20)], max_time=1000.0, **GREEDY
        )
    for length in (28, 36):
        used.append(load_state(tmp_path, KIND)[1]["elapsed"])
        with pytest.raises(Killed):
            TempLoraGenerator.resume(tmp_path, model_with_end(), stopping_criteria=[KillAt(length)])
    assert 0 < used[0] < used[1]
    assert given == pytest.approx([1000.0, 1000.0 - used[0], 1000.0 - used[1]], abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty with checkpoint_dir"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size with checkpoint_dir"),
        ({"watermarking_config": "its class"}, "watermarking_config with checkpoint_dir"),
    ],
)
def test_what_a_checkpoint_cannot_keep_is_refused(settings, reason, tmp_path):
    from transformers import WatermarkingConfig

    settings = {name: WatermarkingConfig() if value == "its class" else value for name, value in settings.items()}
    with pytest.raises(LongpatchError, match=reason):
        TempLoraGenerator(model_with_end(), checkpoint_dir=tmp_path, **SETTINGS).generate(
            random_ids(1, 9), **GREEDY | settings
        )
    assert not list(tmp_path.iterdir())


def test_a_run_that_went_on_can_tell_its_history(tmp_path):
    ids, generator = random_ids(1, 9), TempLoraGenerator(model_with_end(), checkpoint_dir=tmp_path, **SETTINGS)
    generator.generate(ids, **GREEDY)
    again = TempLoraGenerator.resume(tmp_path, model_with_end(), return_dict_in_generate=True)
    assert again.history == generator.history


def test_states_of_another_kind_are_refused(tmp_path):
    ids, model = random_ids(1, 60), model_with_end()
    walk = Walk(20, 30, learn=LearnOptions(rank=4, dropout=0.0))
    list(walk_document(model, ids[0], walk, tmp_path / "walk"))
    with pytest.raises(LongpatchError, match="the state of a walk"):
        TempLoraGenerator.resume(tmp_path / "walk", model)
    TempLoraGenerator(model, checkpoint_dir=tmp_path / "run", **SETTINGS).generate(ids[:, :9], **GREEDY)
    with pytest.raises(LongpatchError, match="the state of a generation"):
        list(walk_document(model, ids[0], walk, tmp_path / "run"))


def test_layers_are_put_back_where_they_compute():
    model = tiny_llama(num_hidden_layers=3)
    assert layer_devices(model, 3) == [torch.device("cpu")] * 3
    model.model.layers[1].to("meta")
    assert [device.type for device in layer_devices(model, 3)] == ["cpu", "meta", "cpu"]
    assert layer_devices(model, 2) == [model.device] * 2
