"""What people put around a model: adapters, quantised weights, offloading, trainers, copies, several processes."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import longpatch
from longpatch import LambdaCache, LongpatchError, convert_llama_model, revert_model
from longpatch.models import load_model
from tests.processes import run_processes
from tests.tiny import random_ids, tiny_llama

WINDOW, SINKS = 12, 3
ADAPTER = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "init_lora_weights": False}


def converted(model=None):
    return convert_llama_model(tiny_llama() if model is None else model, WINDOW, SINKS, slack=8)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def reads_and_writes(model, count=40):
    """Past the window: with a cache as without, several tokens at once and one by one. Returns logits."""
    ids = random_ids(1, count)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    options = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(use_cache=False, **options))
    return logits


def adapter(model):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**ADAPTER))


def test_an_adapter_before_and_after_conversion():
    first, then = adapter(converted()), converted(adapter(tiny_llama()))
    expected = reads_and_writes(first)
    close(reads_and_writes(then), expected)
    plain = converted()
    assert not torch.allclose(plain(random_ids(1, 40)).logits, expected, atol=1e-2)
    ids = random_ids(2, 40)
    for model in (first, then):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in (first, then)]
    assert len(gradients[0]) == 8
    for one, other in zip(*gradients, strict=True):
        close(one, other)
        assert one.abs().max() > 0


@pytest.mark.parametrize("after", [False, True])
def test_adapters_are_trained_merged_and_unloaded(after):
    model = converted(adapter(tiny_llama())) if after else adapter(converted())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = random_ids(4, 40), []
    for _ in range(8):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    expected = reads_and_writes(model.eval())
    merged = copy.deepcopy(model).merge_and_unload()
    close(reads_and_writes(merged), expected)
    close(revert_model(merged)(random_ids(1, WINDOW)).logits, expected[:, :WINDOW])
    unloaded = model.unload()
    close(reads_and_writes(unloaded), reads_and_writes(converted()))


@pytest.fixture
def folder(tmp_path):
    # quantised layers work on blocks of 64, processes share out the vocabulary
    model = tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=98)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(folder, bits):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    with torch.no_grad():
        expected = model(random_ids(1, WINDOW)).logits
    actual = reads_and_writes(converted(model))[:, :WINDOW]
    if bits == 4:
        torch.testing.assert_close(actual, expected, atol=3e-3, rtol=1e-2)
    else:  # activations are quantised by the largest of all tokens, which here are more
        assert torch.corrcoef(torch.stack((actual.flatten(), expected.flatten())))[0, 1] > 0.99


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    source = tiny_llama()
    write_gguf(gguf, source, tmp_path / "tiny.gguf")
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"))
    assert tokenizer.decode(tokenizer("(1 + x)").input_ids) == "(1 + x)"
    expected = reads_and_writes(converted(source))
    close(reads_and_writes(converted(model)), expected)
    model.save_pretrained(tmp_path / "saved")
    close(reads_and_writes(longpatch.from_pretrained(tmp_path / "saved")), expected)


def write_gguf(gguf, model, path):
    """A Llama as llama.cpp's format has it: rows of query and key weights in interleaved order."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    characters = [chr(code) for code in range(33, 33 + config.vocab_size - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "Ġ", *characters, "()", "))"])  # "Ġ" is how byte-level BPE writes a space
    writer.add_token_merges(["( )", ") )"])  # transformers 5.17 takes no list of one
    writer.add_bos_token_id(config.bos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gptq_settings():
    return {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}


def test_gptq_without_its_loader_says_what_is_missing(folder):
    if find_spec("gptqmodel"):
        pytest.skip("gptqmodel is installed")
    model = converted(LlamaForCausalLM.from_pretrained(folder))
    model.config.quantization_config = gptq_settings()
    model.config.save_pretrained(folder)
    with pytest.raises(LongpatchError, match=r"quantised by gptq, needs the package gptqmodel.*pip install") as caught:
        longpatch.from_pretrained(folder)
    assert "optimum" in str(caught.value) or find_spec("optimum")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPTQ kernels need a CUDA device")
def test_gptq(folder):
    pytest.importorskip("gptqmodel", reason="pip install gptqmodel")
    from transformers import GPTQConfig

    settings = GPTQConfig(bits=4, group_size=64, dataset=["a b c"] * 8, tokenizer=None)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cuda")
    reads_and_writes(converted(model))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("after", [False, True])
def test_offloaded_weights(where, after, tmp_path):
    from accelerate import cpu_offload, disk_offload

    expected = reads_and_writes(converted())
    model = tiny_llama() if after else converted()
    device = torch.device("cpu")
    if where == "cpu":
        cpu_offload(model, execution_device=device)
    else:
        disk_offload(model, tmp_path, execution_device=device)
    model = converted(model) if after else model
    close(reads_and_writes(model), expected)
    close(revert_model(model)(random_ids(1, 40)).logits, tiny_llama()(random_ids(1, 40)).logits)


def test_a_device_map_with_disk_offload(folder, tmp_path):
    places = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    expected = reads_and_writes(converted(LlamaForCausalLM.from_pretrained(folder)))
    model = LlamaForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    close(reads_and_writes(converted(model)), expected)


def test_weights_of_attention_are_refused():
    """They are never formed; a switch in the config counts as the argument does."""
    model, ids = converted(), random_ids(1, 20)
    with pytest.raises(LongpatchError, match="output_attentions=True"):
        model(ids, output_attentions=True)
    with pytest.raises(LongpatchError, match="output_attentions=True"):
        model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    reads_and_writes(model)


def test_attention_dropout_is_refused_in_training_only():
    model, ids = converted(tiny_llama(attention_dropout=0.1)), random_ids(1, 40)
    close(reads_and_writes(model), reads_and_writes(converted()))
    with pytest.raises(LongpatchError, match=r"attention dropout of 0\.1.*attention_dropout=0"):
        model.train()(ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    ids = random_ids(16, 40)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = converted()
    with torch.no_grad():
        before = model(ids, labels=ids).loss
    settings = TrainingArguments(
        tmp_path,
        max_steps=6,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        gradient_checkpointing=checkpointing,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model, settings, train_dataset=rows).train()
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).loss < before - 0.1
    reads_and_writes(model)


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    model, ids = converted(), random_ids(1, 40)
    cache = model(ids[:, :30]).past_key_values
    twin = copy.deepcopy(cache)
    model(random_ids(1, 9, 5), past_key_values=cache)
    close(model(ids[:, 30:], past_key_values=twin).logits, model(ids, use_cache=False).logits[:, 30:])
    assert (cache.get_seq_length(), twin.get_seq_length()) == (39, 40)


@torch.no_grad()
def test_a_forward_that_failed_does_not_count():
    model, ids = converted(), random_ids(1, 40)
    cache = model(ids[:, :30]).past_key_values

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids[:, 30:31], past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 30
    close(model(ids[:, 30:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 30:])


def test_from_pretrained_takes_the_saved_settings_up_again(tmp_path):
    model = convert_llama_model(tiny_llama(), 16, 4, limit_distance=20, slack=5)
    model.save_pretrained(tmp_path)
    loaded = longpatch.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.longpatch.config == model.longpatch.config
    assert loaded.dtype == torch.float64
    close(loaded(random_ids(1, 60)).logits.float(), model(random_ids(1, 60)).logits)
    written = loaded.generate(random_ids(1, 5), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(written.past_key_values, LambdaCache)


def test_from_pretrained_of_a_model_that_was_not_converted(folder):
    with pytest.raises(LongpatchError, match="no longpatch settings"):
        longpatch.from_pretrained(folder)


def test_tensor_parallel_over_two_processes(folder, tmp_path):
    """`tp_plan="auto"`: heads are split, so each process has half of every cache."""
    reference = converted(LlamaForCausalLM.from_pretrained(folder))
    expected = reads_and_writes(reference)
    reference.save_pretrained(folder)
    program = Path(__file__).with_name("tensor_parallel.py")
    run_processes([program, folder, tmp_path / "out.pt"], tmp_path / "logs")
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    close(result["logits"], expected)
    written = reference.generate(random_ids(1, 40), max_new_tokens=8, do_sample=False)
    assert torch.equal(result["written"], written)
    assert result["key_heads"] == 1
