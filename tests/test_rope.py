"""Phases are those of the original model, and exact wherever the text stands."""

import pytest
import torch

from longpatch import convert_llama_model
from longpatch.rope import exact_rotary
from tests.tiny import random_ids, read_in_chunks, tiny_llama

ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def with_rope(name, **settings):
    return tiny_llama(rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"} | ROPES[name], **settings)


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_equals_the_original_within_the_window(name):
    model, ids = with_rope(name), random_ids(2, 60)
    expected = model(ids).logits
    torch.testing.assert_close(convert_llama_model(model, 60, 4)(ids).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_shifting_the_text_by_two_hundred_million_changes_nothing(name):
    model, ids = convert_llama_model(with_rope(name, initializer_range=0.1), 20, 4), random_ids(2, 100)
    expected = model(ids).logits
    positions = torch.arange(100)[None] + 200_000_000
    assert (model(ids, position_ids=positions).logits - expected).abs().max() < 1e-4
    assert (model(ids, position_ids=positions, use_cache=False).logits - expected).abs().max() < 1e-4
    output = model(ids[:, :60], position_ids=positions[:, :60])
    for i in range(60, 100):
        output = model(ids[:, i : i + 1], position_ids=positions[:, i : i + 1], past_key_values=output.past_key_values)
    assert (output.logits[:, 0] - expected[:, -1]).abs().max() < 1e-4


@torch.no_grad()
def test_the_original_is_off_there():
    """What is repaired: unpatched, float32 phases at 200 million are noise."""
    model, ids = tiny_llama(initializer_range=0.1), random_ids(2, 60)
    shifted = model(ids, position_ids=torch.arange(60)[None] + 200_000_000).logits
    assert (shifted - model(ids).logits).abs().max() > 1e-2


@torch.no_grad()
def test_attention_scaling_is_not_undone_with_the_phase():
    """yarn scales cos and sin; far queries and sinks are scaled once already."""
    ids = random_ids(1, 100)
    model = convert_llama_model(with_rope("yarn"), 20, 4)
    assert model.longpatch.rotary.attention_scaling != 1.0
    one_shot = model(ids, use_cache=False).logits
    torch.testing.assert_close(read_in_chunks(model, ids, (9,))[0], one_shot, atol=3e-4, rtol=1e-4)


def test_phases_are_exact_to_a_billion():
    rotary = exact_rotary(tiny_llama(head_dim=64).model.rotary_emb, 64)[1]
    position = torch.tensor([[123, 10**9 + 123]])
    cos, sin, _ = rotary.phase(position - torch.tensor([[0, 10**9]]))
    torch.testing.assert_close(cos[0, 0], cos[0, 1], atol=0, rtol=0)
    shift, far = rotary.phase(torch.tensor([[10**9]])), rotary.phase(torch.tensor([[10**9 + 123]]))
    difference = far.cos * shift.cos + far.sin * shift.sin  # cos(a - b)
    assert (difference[0, 0] - cos[0, 0]).abs().max() < 1e-6
    assert sin.shape == (1, 2, 64)


@torch.no_grad()
def test_bfloat16_models_keep_exact_frequencies():
    """model.to(bfloat16) rounds the model's own inv_freq; the conversion computes it anew."""
    rounded = tiny_llama().to(torch.bfloat16)
    convert_llama_model(rounded, 20, 4)
    _, exact = exact_rotary(tiny_llama().model.rotary_emb, 20)
    assert torch.equal(rounded.longpatch.rotary.frequencies, exact.frequencies)
    convert_llama_model(exact_then_cast := tiny_llama(), 20, 4)
    exact_then_cast.to(torch.bfloat16)
    assert torch.equal(exact_then_cast.longpatch.rotary.frequencies, exact.frequencies)
