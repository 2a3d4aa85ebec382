"""Shifted sparse attention is its dense definition, sees no future, and is there in training only."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from longpatch import LongpatchError, convert_model
from longpatch.finetune.shifted import shift_attention, shifted_attention
from tests.tiny import random_ids, tiny_llama

SHAPES = [(64, 16, 4, 2), (61, 16, 4, 4), (50, 17, 9, 3), (7, 16, 3, 1), (33, 2, 2, 1), (20, 20, 4, 2)]


def dense(query, key, value, group):
    """The definition: scores of all pairs, float64."""
    heads, n, dim = query.shape[1:]
    key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    shift = torch.tensor([0] * (heads - heads // 2) + [group // 2] * (heads // 2))[:, None]
    number = torch.div(torch.arange(n) - shift, group, rounding_mode="floor")  # [H, n]
    seen = (number[:, :, None] == number[:, None]) & torch.ones(n, n, dtype=torch.bool).tril()
    scores = (query @ key.transpose(2, 3)) / dim**0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value


def inputs(n, heads, key_heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, h, n, 8) for h in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("n", "group", "heads", "key_heads"), SHAPES)
def test_equals_the_dense_definition(n, group, heads, key_heads):
    ours, theirs = inputs(n, heads, key_heads), inputs(n, heads, key_heads)
    weight = torch.randn(2, heads, n, 8, dtype=torch.float64)
    out, expected = shifted_attention(*ours, group), dense(*theirs, group)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("group", [0.25, 16, 10])
@pytest.mark.parametrize("changed", [1, 15, 30, 60])
def test_no_token_sees_a_later_one(group, changed):
    """The wrap-around of the original lets the first tokens see the last ones."""
    model, ids = tiny_llama().train(), random_ids(2, 61)
    shift_attention(model, group)
    before = model(ids, use_cache=False).logits
    ids[:, changed:] = random_ids(2, 61, seed=1)[:, changed:]
    after = model(ids, use_cache=False).logits
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before, after)


@torch.no_grad()
def test_attention_is_full_outside_of_training():
    model, ids = tiny_llama(), random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    before, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    changes = shift_attention(model)
    assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
    assert (model.train()(ids).logits - before).abs().max() > 1e-2
    with pytest.raises(LongpatchError, match="left padding"):
        model(ids, attention_mask=mask)
    right = mask.flip(1)
    torch.testing.assert_close(model(ids, attention_mask=right).logits, model(ids).logits)
    wider = shift_attention(model, 0.5)  # anew, instead of the first
    wider.undo()
    changes.undo()
    assert torch.equal(model(ids).logits, before)


def test_models_it_cannot_shift_are_refused():
    with pytest.raises(LongpatchError, match="is converted"):
        shift_attention(convert_model(tiny_llama(), 16, 2))
    with pytest.raises(LongpatchError, match=r"is a|does not use"):
        shift_attention(torch.nn.Linear(2, 2))
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 9}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2, "pad_token_id": 0}
    for family, reason in (("gpt_oss", "learned sinks"), ("gemma2", "attn_logit_softcapping")):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
        before = model.config._attn_implementation
        with pytest.raises(LongpatchError, match=reason):
            shift_attention(model)
        assert model.config._attn_implementation == before
    shift_attention(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)))
