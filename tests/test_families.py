"""Every family: within the window the original, past it the definition, generated, trained, reverted."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from longpatch import LongpatchError, convert_gpt_j_model, convert_model, convert_mpt_model, revert_model
from longpatch.families import FAMILIES
from tests.families import CASES, COMMON, reference_model, tiny_model
from tests.tiny import random_ids, read_in_chunks

WINDOW, SINKS, DISTANCE = 16, 4, 20
CONVERT = {"mpt": convert_mpt_model, "gptj": convert_gpt_j_model}
every_family = pytest.mark.parametrize("name", CASES)


def converted(name) -> Any:
    model = tiny_model(name)
    convert = CONVERT.get(model.config.model_type, convert_model)
    assert convert(model, WINDOW, SINKS, limit_distance=DISTANCE) is model
    return model


def assert_close(actual, expected):
    """Phases are float32 on purpose; all else is float64 here."""
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_every_family_is_tested():
    assert {case.model_type or name for name, case in CASES.items()} >= set(FAMILIES)


@every_family
@torch.no_grad()
def test_equals_the_original_within_the_window(name):
    ids = random_ids(2, WINDOW)
    expected = tiny_model(name)(ids).logits
    model = converted(name)
    assert_close(model(ids, use_cache=False).logits, expected)
    assert_close(read_in_chunks(model, ids, (9, 1))[0], expected)


@every_family
@torch.no_grad()
def test_follows_the_definition_past_the_window(name):
    """In one go and in chunks, with left padding, past every length the model was made for."""
    first = torch.tensor([0, 7])
    ids = random_ids(2, 110)
    mask = (torch.arange(110) >= first[:, None]).long()
    expected = reference_model(name, WINDOW, SINKS, DISTANCE, first)(ids).logits
    model = converted(name)
    for actual in (
        model(ids, attention_mask=mask, use_cache=False).logits,
        read_in_chunks(model, ids, (37, 1, 1, 20), mask)[0],
    ):
        assert_close(actual[mask.bool()], expected[mask.bool()])


@every_family
def test_generates_the_same_with_and_without_a_cache(name):
    model, ids = converted(name), random_ids(2, 12)
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(ids, use_cache=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
    assert cached.past_key_values.get_seq_length() == 41
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits))


@every_family
def test_gradients_are_those_of_the_definition(name):
    ids = random_ids(2, 50)
    model, reference = converted(name), reference_model(name, WINDOW, SINKS, DISTANCE)
    for each in (model, reference):
        each(ids, labels=ids).loss.backward()
    for (parameter_name, actual), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None), parameter_name
        if actual.grad is not None:
            assert_close(actual.grad, expected.grad)


@every_family
@torch.no_grad()
def test_revert_is_bit_identical(name):
    model, ids = tiny_model(name), random_ids(2, 40)
    expected, state = model(ids).logits, {key: tensor.clone() for key, tensor in model.state_dict().items()}
    convert_model(model, WINDOW, SINKS)
    model(ids)
    revert_model(model)
    assert torch.equal(model(ids).logits, expected)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_sliding_layers_hold_their_own_window():
    model = converted("gemma3_text")
    cache = model(random_ids(1, 100)).past_key_values
    slack = model.longpatch.config.slack
    held = [(layer.keys.shape[2], layer.values.shape[2]) for layer in cache.layers]
    # Keys of sinks three times: as they came, a quarter turn on, and as a decode step sees them.
    assert held == [(8 + slack, 8 + slack), (3 * SINKS + WINDOW + slack, SINKS + WINDOW + slack)]


def test_the_default_window_is_what_the_model_was_trained_with():
    windows = {name: convert_model(tiny_model(name)).longpatch.config.local_branch for name in SLIDING}
    assert windows == SLIDING


SLIDING = {"mistral": 64, "mistral-sliding": 40, "gemma2": 64, "mpt": 64, "gptj": 64}


@pytest.mark.parametrize("name", ["gptj", "falcon", "stablelm", "gemma3_text"])
@torch.no_grad()
def test_shifting_the_text_by_a_billion_changes_nothing(name):
    model, ids = converted(name), random_ids(1, 60)
    positions = torch.arange(60)[None] + 10**9
    assert_close(model(ids, position_ids=positions).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["falcon", "gptj", "mpt", "stablelm", "gpt_oss"])
def test_copies_and_checkpointing_work_where_the_step_takes_another_way(name, tmp_path):
    """Two forwards before one backward: a layer that is computed again must see its own forward's step."""
    model, ids = converted(name), [random_ids(1, 40, seed) for seed in (0, 1)]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin.gradient_checkpointing_enable()
    for each in (model, twin):
        each.train()
        (each(ids[0], labels=ids[0]).loss + each(ids[1][:, :30], labels=ids[1][:, :30]).loss).backward()
    for expected, actual in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(actual.grad, expected.grad)
    twin.eval().save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    convert_model(loaded)
    assert loaded.longpatch.config == model.longpatch.config
    assert_close(loaded(ids[0]).logits, model.eval()(ids[0]).logits)
    assert torch.equal(revert_model(twin)(ids[0]).logits, tiny_model(name)(ids[0]).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["falcon", "gptj", "mpt", "gpt_oss", "gemma2", "cohere2", "smollm3"])
@torch.no_grad()
def test_half_precision_stays_near_float64(name, dtype):
    ids = random_ids(1, 80)
    exact = converted(name)(ids).logits
    model = convert_model(tiny_model(name, dtype=dtype), WINDOW, SINKS, limit_distance=DISTANCE)
    rounding = (tiny_model(name, dtype=dtype)(ids[:, :WINDOW]).logits - exact[:, :WINDOW]).abs().max()
    actual, _ = read_in_chunks(model, ids, (30, 1))
    assert actual.dtype == dtype
    assert (actual - exact).abs().max() < 6 * rounding


REFUSED = {
    "Gemma3": (Gemma3Config, {}, "more than text; its text part, 'gemma3_text'"),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 1, "n_head": 2}, "'gpt2': its learned position embeddings end"),
    "falcon": (FalconConfig, COMMON | {"alibi": True}, "Falcon with `alibi=True`"),
    "gemma3_text": (Gemma3TextConfig, COMMON | {"use_bidirectional_attention": True}, "attention that looks ahead"),
    "llama": (LlamaConfig, COMMON | {"layer_types": ["linear_attention"] * 2}, "layers that neither slide"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_with_its_reason(name):
    config_class, settings, reason = REFUSED[name]
    with torch.device("meta"):
        model = PreTrainedModel(config_class(**settings))
    with pytest.raises(LongpatchError, match=re.escape(reason)):
        convert_model(model, 8)


def test_a_multimodal_model_is_refused_and_its_text_part_is_not():
    text = Gemma3TextConfig(**COMMON | CASES["gemma3_text"].settings)
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LongpatchError, match="'gemma3': more than text"):
        convert_model(model, 16)
    assert convert_model(Gemma3ForCausalLM(text), 16, 4)(random_ids(1, 40)).logits.shape == (1, 40, 97)
