"""A merged model is the base with its adapter, positions included, and needs neither any more."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longpatch import LongpatchError
from longpatch.adapter import read_record, write_record
from longpatch.cli import main
from longpatch.demo import load
from longpatch.finetune import read_config
from longpatch.finetune.merge import merge
from longpatch.finetune.model import prepare_model
from longpatch.finetune.run import adapter_record
from longpatch.models import load_model
from tests.test_train import write_base, write_config
from tests.tiny import random_ids, tiny_llama


def write_adapter(folder, output, **sections):
    """An adapter as training writes it, with every weight that learns moved at random."""
    config = read_config(write_config(folder, output, **sections))
    model, _ = prepare_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    model.save_pretrained(folder / output)
    write_record(folder / output, adapter_record(config, model))
    return folder / output


@torch.no_grad()
def logits(model):
    return model(random_ids(1, 120), use_cache=False).logits.float()


CASES = {
    "norms": {},
    "embeddings": {"lora": {"embeddings": True}},
    "theta": {"rope": {"method": None, "theta": 5e5}},
    "nf4": {"model": {"quantization": "nf4"}},
}


@pytest.mark.parametrize("case", CASES)
def test_merged_is_base_and_adapter(case, tmp_path, capsys):
    write_base(tmp_path)
    adapter = write_adapter(tmp_path, "adapter", **CASES[case])
    base, merged = str(tmp_path / "base"), tmp_path / "merged"
    assert main(["merge", base, str(adapter), str(merged)]) == 0
    printed = capsys.readouterr().out
    both, _ = load_model(base, adapter=str(adapter))
    alone = AutoModelForCausalLM.from_pretrained(merged).eval()
    expected = logits(both)
    torch.testing.assert_close(logits(alone), expected, atol=1e-4, rtol=1e-4)
    assert (logits(load_model(base)[0]) - expected).abs().max() > 0.1
    rope = alone.config.rope_parameters
    assert rope["rope_theta"] == 5e5 if case == "theta" else rope["rope_type"] == "linear"
    assert alone.config.max_position_embeddings == 128
    assert "base + adapter, unquantised: logits differ by" in printed
    record = read_record(adapter)
    write_record(adapter, record | {"base": "another"})
    with pytest.warns(UserWarning, match=f"was trained on another, and is merged into {base}"):
        merge(base, adapter, tmp_path / "again", quantized_gap=False)
    assert ("base in nf4 + adapter" in printed) == (case == "nf4")
    with pytest.raises(LongpatchError, match="holds a model already"):
        merge(base, adapter, merged)


def test_embeddings_that_are_the_head_too(tmp_path):
    write_base(tmp_path)
    tied = tiny_llama(vocab_size=4096, initializer_range=0.05, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path, "adapter", lora={"embeddings": True})
    both, _ = load_model(str(tmp_path / "base"), adapter=str(adapter))
    merge(str(tmp_path / "base"), adapter, tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(alone), logits(both), atol=1e-4, rtol=1e-4)
    assert alone.get_output_embeddings().weight is alone.get_input_embeddings().weight
    assert (alone.get_input_embeddings().weight - tied.get_input_embeddings().weight).abs().max() > 0.01


def test_the_stored_dtype_is_kept_and_the_sum_is_in_float32(tmp_path):
    write_base(tmp_path)
    tiny_llama(vocab_size=4096, initializer_range=0.05, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path, "adapter")
    exact, stored = merge(str(tmp_path / "base"), adapter, tmp_path / "merged"), tmp_path / "merged"
    merged = AutoModelForCausalLM.from_pretrained(stored)
    assert merged.dtype == torch.bfloat16
    expected = load_model(str(tmp_path / "base"), adapter=str(adapter))[0].merge_and_unload()
    for (name, weight), other in zip(merged.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other.to(torch.bfloat16)), name
    assert 0 < exact[0].logits < 0.1


def test_the_demo_is_merged_too(tmp_path):
    _, tokenizer = load()
    config = write_config(tmp_path, "adapter", model={"name": "demo"}, rope={"target_length": 512})
    tmp_path.joinpath("book.txt").write_text("It was a dark and stormy night. " * 20)
    model, _ = prepare_model(read_config(config))
    model.save_pretrained(tmp_path / "adapter")
    write_record(tmp_path / "adapter", adapter_record(read_config(config), model))
    (gap,) = merge("demo", tmp_path / "adapter", tmp_path / "merged")
    assert gap.divergence < 1e-3
    model, merged_tokenizer = load_model(str(tmp_path / "merged"))
    assert model.dtype == torch.float32
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}  # as BASE's are
    assert merged_tokenizer.encode("A night.") == tokenizer.encode("A night.")
