"""Masks and positions that a converted model cannot honour are refused by name."""

import pytest
import torch
from transformers import StaticCache

from longpatch import LongpatchError, convert_llama_model
from tests.tiny import random_ids, tiny_llama


@pytest.fixture
def model():
    return convert_llama_model(tiny_llama(), 12, 3)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.long)


def test_a_four_dimensional_mask(model):
    with pytest.raises(LongpatchError, match=r"attention_mask has shape \[1, 1, 8, 8\]"):
        model(random_ids(1, 8), attention_mask=torch.zeros(1, 1, 8, 8))


def test_a_mask_of_another_length(model):
    with pytest.raises(LongpatchError, match="8 new tokens"):
        model(random_ids(1, 8), attention_mask=ones(1, 6))


def test_a_gap_between_tokens(model):
    mask = ones(2, 8)
    mask[1, 3] = 0
    with pytest.raises(LongpatchError, match="between tokens"):
        model(random_ids(2, 8), attention_mask=mask)


def test_tokens_after_right_padding(model):
    mask = ones(2, 8)
    mask[1, 6:] = 0
    cache = model(random_ids(2, 8), attention_mask=mask).past_key_values
    with pytest.raises(LongpatchError, match="right padding"):
        model(random_ids(2, 1), attention_mask=torch.cat((mask, ones(2, 1)), dim=1), past_key_values=cache)


def test_packed_rows(model):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(LongpatchError, match="restart"):
        model(random_ids(1, 8), position_ids=positions)


def test_padding_does_not_count_as_a_restart(model):
    """generate numbers left padding 0 or 1, whatever follows."""
    mask, positions = ones(1, 8), torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4]])
    mask[0, :3] = 0
    alone = model(random_ids(1, 8)[:, 3:]).logits
    padded = model(random_ids(1, 8), attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


def test_attention_matrices(model):
    with pytest.raises(LongpatchError, match="output_attentions"):
        model(random_ids(1, 8), output_attentions=True)


def test_every_reason_is_told_at_once(model):
    cache = StaticCache(model.config, max_cache_len=16)
    with pytest.raises(LongpatchError) as caught:
        model(random_ids(1, 8), attention_mask=ones(1, 1, 8, 8), past_key_values=cache, output_attentions=True)
    assert caught.value.reasons == [
        "past_key_values is a StaticCache of StaticLayer",
        "attention_mask has shape [1, 1, 8, 8]",
        "output_attentions=True: Λ-attention never forms the matrix of weights",
    ]
    assert cache.get_seq_length() == 0


def test_attention_dropout():
    model = convert_llama_model(tiny_llama(attention_dropout=0.1), 12, 3)
    model(random_ids(1, 8))
    with pytest.raises(LongpatchError, match="dropout"):
        model.train()(random_ids(1, 8))
