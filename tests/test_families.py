"""Every family: within the window the original, past it the definition, generated, trained, reverted."""

import pytest
import torch

from longpatch import convert_gpt_j_model, convert_model, convert_mpt_model, revert_model
from longpatch.families import FAMILIES
from tests.families import CASES, reference_model, tiny_model
from tests.tiny import random_ids, read_in_chunks

WINDOW, SINKS, DISTANCE = 16, 4, 20
CONVERT = {"mpt": convert_mpt_model, "gptj": convert_gpt_j_model}
every_family = pytest.mark.parametrize("name", CASES)


def converted(name):
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
