"""What conversion changes, what it leaves alone, and how it is undone."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, LlamaForCausalLM

from longpatch import (
    LambdaConfig,
    LongpatchError,
    Recall,
    convert_llama_model,
    convert_model,
    convert_yi_model,
    revert_model,
)
from longpatch_kernels import IMPLEMENTATIONS
from tests.families import tiny_model
from tests.tiny import random_ids, tiny_llama


@given(count=st.integers(1, 48), seed=st.integers(0, 100), use_cache=st.booleans())
def test_equals_the_original_within_the_window(count, seed, use_cache):
    model, ids = tiny_llama(seed), random_ids(2, count, seed)
    with torch.no_grad():
        expected = model(ids).logits
        actual = convert_llama_model(model, 48, 10)(ids, use_cache=use_cache).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_generates_the_same_tokens_within_the_window():
    model, ids = tiny_llama(), random_ids(3, 8)
    expected = model.generate(ids, max_new_tokens=50, do_sample=False)
    assert torch.equal(convert_llama_model(model, 58, 4).generate(ids, max_new_tokens=50, do_sample=False), expected)


def structure(model):
    """Everything a conversion might touch, of any module: attributes, hooks, children, weights, config."""
    modules = {}
    for name, module in model.named_modules():
        attributes = dict(vars(module))
        copied = [key for key in attributes if key in ("_modules", "_parameters", "_buffers") or "hooks" in key]
        modules[name] = attributes | {key: dict(attributes[key]) for key in copied}
    config = getattr(model, "config", None)
    return {
        "modules": modules,
        "config": None if config is None else copy.deepcopy(config.to_dict()),
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta},
    }


def snapshot(model):
    return structure(model) | {"logits": model(random_ids(1, 100)).logits}


def assert_same(before, after):
    assert before["config"] == after["config"]
    assert ("logits" in before) == ("logits" in after)
    assert "logits" not in before or torch.equal(before["logits"], after["logits"])
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])
    assert before["modules"].keys() == after["modules"].keys()
    for name, attributes in before["modules"].items():
        assert attributes.keys() == after["modules"][name].keys(), name
        for key, value in attributes.items():
            other = after["modules"][name][key]
            assert unchanged(value, other), (name, key)


def unchanged(value, other):
    """The same object, or a dict of the same objects, or equal plain data."""
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(unchanged(value[key], other[key]) for key in value)
    return other is value or (not isinstance(value, torch.Tensor | torch.nn.Module) and other == value)


def test_revert_restores_everything():
    model = tiny_llama()
    before, config = snapshot(model), model.config
    convert_llama_model(model, 16, 4)
    convert_llama_model(model, 24, 2, limit_distance=30)
    model.generate(random_ids(1, 5), max_new_tokens=40)
    assert revert_model(model) is model
    assert model.config is config
    assert_same(before, snapshot(model))
    assert_same(before, snapshot(revert_model(model)))


def test_a_failed_conversion_changes_nothing():
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(LongpatchError):
        convert_llama_model(model, 0)
    assert_same(before, snapshot(model))
    converted = snapshot(convert_llama_model(model, 16, 4))
    with pytest.raises(LongpatchError):
        convert_llama_model(model, -3)
    assert_same(converted, snapshot(model))


def test_converting_twice_equals_once_with_the_new_settings():
    ids = random_ids(2, 100)
    twice = convert_llama_model(convert_llama_model(tiny_llama(), 16, 10), 24, 3, limit_distance=40)
    once = convert_llama_model(tiny_llama(), 24, 3, limit_distance=40)
    assert torch.equal(twice(ids).logits, once(ids).logits)
    assert twice.config.to_dict() == once.config.to_dict()


def test_models_that_share_a_config_stay_apart():
    config = tiny_llama().config
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    ids = random_ids(1, 100)
    expected = other(ids).logits
    convert_llama_model(one, 16, 4)
    assert other.config is config
    assert not hasattr(config, "longpatch")
    assert torch.equal(other(ids).logits, expected)
    convert_llama_model(other, 32, 4)
    assert (one.longpatch.config.local_branch, other.longpatch.config.local_branch) == (16, 32)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(duplicate):
    model, ids = convert_llama_model(tiny_llama(), 16, 4), random_ids(1, 100)
    expected = model(ids).logits
    twin = duplicate(model)
    assert torch.equal(twin(ids).logits, expected)
    revert_model(twin)
    assert torch.equal(twin(ids).logits, tiny_llama()(ids).logits)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(
        model.generate(ids, max_new_tokens=5), convert_model(twin, 16, 4).generate(ids, max_new_tokens=5)
    )


def test_settings_survive_saving(tmp_path):
    ids = random_ids(1, 100)
    model = convert_llama_model(tiny_llama(), 16, 4, limit_distance=20)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, tiny_llama()(ids).logits), "a loaded model is not converted by itself"
    assert torch.equal(convert_model(loaded)(ids).logits, expected)
    assert loaded.longpatch.config == model.longpatch.config


def test_defaults():
    model = convert_model(tiny_llama(max_position_embeddings=50))
    assert model.longpatch.config == LambdaConfig(50, 10, 50)


def test_yi_and_peft_models_are_converted():
    ids = random_ids(1, 100)
    expected = convert_llama_model(tiny_llama(), 16, 4)(ids).logits
    assert torch.equal(convert_yi_model(tiny_llama(), 16, 4)(ids).logits, expected)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert convert_llama_model(model, 16, 4) is model
    torch.testing.assert_close(model(ids).logits, expected)
    assert model.generate(input_ids=ids, max_new_tokens=3).shape == (1, 103)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    revert_model(model)
    torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = random_ids(2, 60)
    plain, saving = convert_llama_model(tiny_llama(), 9, 3).train(), convert_llama_model(tiny_llama(), 9, 3).train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(ids, labels=ids).loss.backward()
    for expected, actual in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def on_meta(hook=None):
    with torch.device("meta"):
        model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=False)
    for module in model.modules() if hook else ():
        if list(module.parameters(recurse=False)):
            add_hook_to_module(module, hook())
    return model


def other_architecture(kind, **settings):
    settings |= {"vocab_size": 64, "num_layers": 1, "num_heads": 2}
    return AutoModel.from_config(AutoConfig.for_model(kind, **settings))


def bert():
    return other_architecture("bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)


def t5():
    return other_architecture("t5", d_model=16, d_kv=8, d_ff=16)


NOT_LOADED = [
    "parameters on the meta device that nothing loads, "
    "in model.embed_tokens, model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, ..."
]
KERNELS = ", ".join(("auto", *IMPLEMENTATIONS))
T5 = ["encoder-decoder models", "architecture 't5'"]
SLIDES = "local_branch=41 is more than the sliding window that every layer was trained with, 40"
BAD = {  # what is converted, with what, and every reason against it
    "window": (tiny_llama, {"local_branch": 0}, ["local_branch=0 must be an integer of at least 1"]),
    "sinks": (
        tiny_llama,
        {"local_branch": 8, "global_branch": -1},
        ["global_branch=-1 must be an integer of at least 0"],
    ),
    "distance": (
        tiny_llama,
        {"local_branch": 8, "limit_distance": 7},
        ["limit_distance=7 must be an integer of at least 8, the local_branch"],
    ),
    "implementation": (
        tiny_llama,
        {"local_branch": 8, "implementation": "magic"},
        [f"implementation='magic' must be one of {KERNELS}"],
    ),
    "recall": (
        tiny_llama,
        {"local_branch": 8, "slack": -1, "recall": Recall(block_tokens=4, from_layer=2)},
        [
            "recall from layer 2 to None covers none of the model's 2 layers",
            "slack=-1 must be an integer of at least 0",
        ],
    ),
    "sliding": (
        lambda: tiny_model("mistral-sliding"),
        {"local_branch": 41, "global_branch": -1},
        [SLIDES, "global_branch=-1 must be an integer of at least 0"],
    ),
    "bert": (bert, {}, ["architecture 'bert'"]),
    "bert and distance": (bert, {"limit_distance": 7, "recall": Recall()}, ["architecture 'bert'"]),
    "t5": (t5, {}, T5),
    "t5 and settings": (
        t5,
        {"local_branch": 0, "global_branch": -1},
        [
            *T5,
            "local_branch=0 must be an integer of at least 1",
            "global_branch=-1 must be an integer of at least 0",
        ],
    ),
    "linear": (lambda: torch.nn.Linear(2, 2), {}, ["model is a Linear, not a model of transformers"]),
    "meta": (on_meta, {"local_branch": 8}, NOT_LOADED),
    "meta, hooks that load nothing": (
        lambda: on_meta(lambda: SequentialHook(ModelHook(), AlignDevicesHook(io_same_device=True))),
        {"local_branch": 8},
        NOT_LOADED,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_refused_with_every_reason(name):
    make, settings, reasons = BAD[name]
    model = make()
    before = structure(model)
    with pytest.raises(LongpatchError) as caught:
        convert_model(model, **settings)
    assert caught.value.reasons == reasons
    assert "llama" in str(caught.value)
    assert_same(before, structure(model))


def test_many_sinks_are_warned_of():
    with pytest.warns(UserWarning, match="more than a quarter"):
        convert_llama_model(tiny_llama(), 16, 5)
