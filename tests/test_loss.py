"""The chunked loss is the model's own, value and gradient, for less memory."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longpatch import convert_model
from longpatch.finetune.loss import chunk_loss
from tests.tiny import VOCABULARY, random_ids, tiny_llama

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
}


def model_of(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | FAMILIES[family])).train()


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_the_models_own(family, chunk):
    model, ids = model_of(family), random_ids(2, 20)
    labels = ids.clone()
    labels[0, :9] = -100
    expected, gradients = loss_and_gradients(model, input_ids=ids, labels=labels, use_cache=False)
    changes = chunk_loss(model, chunk)
    actual, ours = loss_and_gradients(model, input_ids=ids, labels=labels)
    assert actual.logits is None
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)
    assert model(ids).logits.shape == (2, 20, VOCABULARY)
    changes.undo()
    assert model(input_ids=ids, labels=labels).logits is not None


def test_accumulated_steps_count_tokens():
    model, ids = model_of("llama"), random_ids(1, 20)
    chunk_loss(model)
    whole = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(input_ids=ids, labels=ids, num_items_in_batch=38).loss, whole / 2)


@pytest.mark.parametrize("converted", [False, True])
def test_a_prompt_without_gradient(converted):
    model, ids = tiny_llama().train(), random_ids(1, 40)
    if converted:
        convert_model(model, 16, 2)
    labels = ids.clone()
    labels[:, :30] = -100
    chunk_loss(model, prompt_grad=False)
    short, gradients = loss_and_gradients(model, input_ids=ids, labels=labels)
    embedded = gradients["model.embed_tokens.weight"].abs().sum(dim=1) > 0
    assert set(embedded.nonzero().flatten().tolist()) <= set(ids[0, 29:].tolist())
    chunk_loss(model, prompt_grad=True)
    whole, _ = loss_and_gradients(model, input_ids=ids, labels=labels)
    torch.testing.assert_close(short.loss, whole.loss, atol=1e-4, rtol=1e-4)
