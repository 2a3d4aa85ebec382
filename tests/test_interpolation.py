"""Stretched positions are those of transformers with the same settings, and can be taken back."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longpatch import LongpatchError, convert_model, from_pretrained, interpolate_rope, revert_model, revert_rope
from longpatch.demo import load
from longpatch.finetune.shifted import shift_attention
from longpatch.models import load_model
from tests.tiny import VOCABULARY, random_ids, tiny_llama

ORIGINAL = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": ORIGINAL,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "stablelm": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"num_key_value_heads": 2},  # pairs lie side by side
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "deepseek_v3": {  # a part of each head turns, that all heads share
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
# The settings that transformers is given, for a factor of 4.
SETTINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {"rope_type": "llama3", "factor": 4.0} | BANDS,
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4 ** (i / 7) for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}


def tiny(family, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | FAMILIES.get(family, {}) | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def expected_model(model, folder, method):
    """The same weights, loaded by transformers alone with the same settings."""
    model.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        config.rope_parameters = parameters | SETTINGS[method]
    else:
        config.rope_parameters = parameters | {"full_attention": parameters["full_attention"] | SETTINGS[method]}
    config.max_position_embeddings = ORIGINAL if method == "dynamic" else 4 * ORIGINAL
    return AutoModelForCausalLM.from_pretrained(folder, config=config).eval()


CASES = [("llama", method) for method in (*SETTINGS, "ntk", "theta")] + [
    (family, method) for family in FAMILIES if family != "llama" for method in ("linear", "yarn")
]


@pytest.mark.parametrize(("family", "method"), [case for case in CASES if case[1] in SETTINGS])
def test_equals_transformers_with_the_same_settings(family, method, tmp_path):
    model, ids = tiny(family), random_ids(1, 3 * ORIGINAL)
    before = logits(model, ids)
    expected = logits(expected_model(model, tmp_path, method), ids)
    interpolate_rope(model, method=method, factor=4)
    assert torch.equal(logits(model, ids), expected)
    assert (expected != before).any() == (method != "none")
    assert torch.equal(logits(revert_rope(model), ids), before)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_survives_saving_in_transformers_alone(family, method, tmp_path):
    model, ids = tiny(family), random_ids(1, 3 * ORIGINAL)
    before = logits(model, ids)
    interpolate_rope(model, **{"theta": 2e6} if method == "theta" else {"method": method, "factor": 4})
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(interpolate_rope(loaded), ids), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(revert_rope(loaded), ids), before)


def test_ntk_divides_the_slowest_frequency_by_the_factor_and_keeps_the_fastest():
    model = tiny_llama()
    before = model.model.rotary_emb.inv_freq.clone()
    after = interpolate_rope(model, method="ntk", factor=4).model.rotary_emb.inv_freq
    torch.testing.assert_close(after[[0, -1]], before[[0, -1]] / torch.tensor([1.0, 4.0]))


def test_theta_alone_and_lengths():
    model = interpolate_rope(tiny_llama(), theta=200e6, target_length=1000)
    assert model.config.rope_parameters["rope_theta"] == 200e6
    assert model.config.rope_parameters["rope_type"] == "default"
    assert model.config.max_position_embeddings == 1000
    model = interpolate_rope(tiny_llama(), method="linear", target_length=130)
    assert model.config.rope_parameters["factor"] == 3.0  # 130 / 64, rounded up
    assert model.config.max_position_embeddings == 130


def test_a_second_interpolation_starts_from_the_original():
    model, ids = tiny_llama(), random_ids(1, 100)
    once = logits(interpolate_rope(copy.deepcopy(model), method="linear", factor=3), ids)
    interpolate_rope(model, method="yarn", factor=8)
    assert torch.equal(logits(interpolate_rope(model, method="linear", factor=3), ids), once)
    assert model.config.max_position_embeddings == 3 * ORIGINAL


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3", "longrope", "dynamic"])
def test_conversion_and_interpolation_in_either_order(method):
    model, ids = tiny_llama(), random_ids(1, 200)
    before, converted = logits(model, ids), logits(convert_model(copy.deepcopy(model), 50, 4), ids)
    first = convert_model(interpolate_rope(copy.deepcopy(model), method=method, factor=4), 50, 4)
    second = interpolate_rope(convert_model(copy.deepcopy(model), 50, 4), method=method, factor=4)
    both = logits(first, ids)
    assert not torch.equal(both, converted) or method in ("longrope", "dynamic")  # frozen for a window of 50
    assert torch.equal(logits(second, ids), both)
    for twice in (first, second):
        assert torch.equal(logits(revert_rope(copy.deepcopy(twice)), ids), converted)
        assert torch.equal(logits(revert_model(revert_rope(twice)), ids), before)
        interpolate_rope(convert_model(twice, 50, 4), method=method, factor=4)
        assert torch.equal(logits(revert_rope(revert_model(twice)), ids), before)
        assert getattr(twice.config, "longpatch_rope", None) is None


@pytest.mark.parametrize("attention", ["shifted first", "interpolated first"])
def test_shifted_attention_and_interpolation_in_either_order(attention):
    model, ids = tiny_llama().train(), random_ids(1, 200)
    plain, shifted = logits(model, ids), copy.deepcopy(model)
    shift_attention(shifted, 16)
    far, both = copy.deepcopy(model), copy.deepcopy(shifted)
    interpolate_rope(far, method="linear", factor=4)
    interpolate_rope(both, method="linear", factor=4)
    expected = logits(both, ids)
    assert not any(torch.equal(expected, logits(other, ids)) for other in (model, shifted, far))
    if attention == "shifted first":
        shift = shift_attention(model, 16)
        interpolate_rope(model, method="linear", factor=4)
    else:
        interpolate_rope(model, method="linear", factor=4)
        shift = shift_attention(model, 16)
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(revert_rope(copy.deepcopy(model)), ids), logits(shifted, ids))
    shift.undo()
    assert torch.equal(logits(model, ids), logits(far, ids))
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert torch.equal(logits(revert_rope(model), ids), plain)


@pytest.mark.parametrize(
    ("family", "method"),
    [("gptj", "linear"), ("gptj", "ntk"), ("gptj", "yarn"), ("gptj", "longrope"), ("codegen", "yarn")],
)
def test_a_table_is_that_of_a_llama_of_its_shape(family, method, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=ORIGINAL, rotary_dim=8
    )
    model, ids = AutoModelForCausalLM.from_config(config).eval(), random_ids(1, 3 * ORIGINAL)
    before = logits(model, ids[:, :ORIGINAL])
    interpolate_rope(model, method=method, factor=4)
    llama = interpolate_rope(tiny_llama(head_dim=8), method=method, factor=4)
    positions = torch.arange(4 * ORIGINAL)[None]
    cos, sin = llama.model.rotary_emb(torch.zeros(1), positions)
    table = model.transformer.h[1].attn.embed_positions
    torch.testing.assert_close(table, torch.cat((sin[0, :, :4], cos[0, :, :4]), dim=1), atol=1e-6, rtol=1e-5)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    load()[1].save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(revert_rope(loaded), ids[:, :ORIGINAL]), before)
    if family == "codegen":
        return  # cannot be converted
    convert_model(model, 3 * ORIGINAL, 4).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(from_pretrained(tmp_path), ids), expected, atol=2e-5, rtol=1e-4)
    wide = logits(model, ids)
    torch.testing.assert_close(wide, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits(revert_model(revert_rope(model)), ids[:, :ORIGINAL]), before)


def test_gptj_and_mpt_read_further_with_nothing_interpolated():
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}
    gptj = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **shape, n_positions=64, rotary_dim=8))
    shape = {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4}
    mpt = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **shape, max_seq_len=64))
    ids = random_ids(1, 150)
    for model, error in ((gptj, "index"), (mpt, "size")):
        before = logits(model.eval(), ids[:, :64])
        with pytest.raises((RuntimeError, IndexError, ValueError), match=error):
            logits(model, ids)
        interpolate_rope(model, method="none", target_length=150)
        torch.testing.assert_close(logits(model, ids)[:, :64], before, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits(revert_rope(model), ids[:, :64]), before)
    with pytest.raises(LongpatchError, match="ALiBi"):
        interpolate_rope(mpt, method="linear", factor=2)
    assert mpt.config.max_seq_len == 64


@torch.no_grad()
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_keys_of_other_frequencies_are_refused(method, loaded, tmp_path):
    model, ids = interpolate_rope(tiny_llama(), method=method, factor=4), random_ids(1, 100)
    if loaded:
        model.save_pretrained(tmp_path)
        load()[1].save_pretrained(tmp_path)
        model, _ = load_model(str(tmp_path))
    cache = model(ids[:, :40]).past_key_values
    model(ids[:, 40:64], past_key_values=cache)
    with pytest.raises(LongpatchError, match="changes its frequencies between 64 and 65"):
        model(ids[:, 64:65], past_key_values=cache)
    assert cache.get_seq_length() == 64
    whole = logits(model, ids)
    cache = model(ids[:, :99]).past_key_values
    if method == "dynamic":
        with pytest.raises(LongpatchError, match="between 99 and 100"):
            model(ids[:, 99:], past_key_values=cache)
    else:
        torch.testing.assert_close(
            model(ids[:, 99:], past_key_values=cache).logits[:, 0], whole[:, -1], atol=1e-4, rtol=1e-4
        )


WRONG = [
    ({}, "neither method nor theta"),
    ({"factor": 2}, "neither method nor theta"),
    ({"method": "linear"}, "needs a factor or a target_length"),
    ({"method": "pi", "factor": 2}, "method='pi' is unknown"),
    ({"method": "linear", "factor": 0.5}, "factor=0.5"),
    ({"method": "linear", "factor": float("nan")}, "factor=nan"),
    ({"method": "linear", "factor": True}, "factor=True"),
    ({"theta": -1}, "theta=-1"),
    ({"method": "yarn", "target_length": 0}, "target_length=0"),
    ({"method": "linear", "factor": 2, "target_length": 1000}, "more than factor=2 times"),
    ({"method": "linear", "factor": 2, "long_factor": [1.0]}, "long_factor belongs to"),
    ({"method": "longrope", "factor": 2, "long_factor": [1.0]}, "1 numbers, the model 8"),
    ({"method": "longrope", "factor": 2, "long_factor": ["a"]}, "must be a list of numbers above 0"),
    ({"theta": 1e6, "target_length": 32}, "target_length=32 is less than the original 64"),
]


@pytest.mark.parametrize(("arguments", "reason"), WRONG)
@pytest.mark.parametrize("interpolated", [False, True])
def test_what_is_wrong_is_said_and_nothing_changes(arguments, reason, interpolated):
    model, ids = tiny_llama(), random_ids(1, 100)
    if interpolated and arguments:
        interpolate_rope(model, method="linear", factor=2)
    config, before = copy.deepcopy(model.config), logits(model, ids)
    with pytest.raises(LongpatchError, match=reason):
        interpolate_rope(model, **arguments)
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == config.to_dict()


def test_positions_that_are_scaled_already_are_not_scaled_again():
    model = tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(LongpatchError, match="scaled already"):
        interpolate_rope(model, method="yarn", factor=2)
    interpolate_rope(model, theta=1e6)
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_follow_the_length_already_are_refused(kind):
    """Another length would be another frequency, whatever the method is."""
    model, ids = tiny_llama(rope_parameters=SETTINGS[kind] | {"rope_theta": 1e4}), random_ids(1, 100)
    before = logits(model, ids)
    for arguments in ({"method": "none", "factor": 4}, {"theta": 1e6}):
        with pytest.raises(LongpatchError, match=f"follow the length of the text already .*{kind}"):
            interpolate_rope(model, **arguments)
    assert torch.equal(logits(model, ids), before)


def test_what_a_family_does_not_take_leaves_the_model_as_it_was():
    model, ids = tiny("phi3"), random_ids(1, 100)
    interpolate_rope(model, method="longrope", factor=4)
    before = logits(model, ids)
    for method in ("linear", "yarn"):
        with pytest.raises(LongpatchError, match=f"phi3 does not take method='{method}'"):
            interpolate_rope(model, method=method, factor=2)
    assert torch.equal(logits(model, ids), before)
    assert model.config.rope_parameters["rope_type"] == "longrope"


def test_models_without_rotary_positions_are_refused():
    with pytest.raises(LongpatchError, match="'gpt2' has no rope_parameters"):
        interpolate_rope(tiny("gpt2", n_embd=32, n_layer=1, n_head=2), method="linear", factor=2)


def test_frequencies_from_another_config_are_refused():
    """As in Granite with sliding windows, whose layers have a theta each."""
    model = tiny_llama()
    model.model.rotary_emb.config = copy.deepcopy(model.config)
    before = model.config.to_dict()
    with pytest.raises(LongpatchError, match=r"model.rotary_emb computes its frequencies from a config of its own"):
        interpolate_rope(model, method="linear", factor=2)
    assert model.config.to_dict() == before


def test_two_models_with_one_config():
    first = tiny_llama()
    second = type(first)(first.config)
    interpolate_rope(first, method="linear", factor=2)
    assert second.config.rope_parameters["rope_type"] == "default"
    assert second.config.max_position_embeddings == ORIGINAL
