"""A cache in fixed memory gives what transformers' growing cache gives."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, FalconConfig

from longpatch import LongpatchError, PreallocatedCache, convert_model, interpolate_rope
from tests.tiny import random_ids, read_in_chunks, tiny_llama

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "padded": {},
}


def pointers(cache):
    return [layer.keys.data_ptr() for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_generates_as_with_a_growing_cache(way):
    model, ids = tiny_llama(), random_ids(1 if way == "prompt lookup" else 2, 20)
    mask = torch.ones_like(ids)
    if way == "padded":
        mask[0, :7] = 0
    outputs = []
    for cache in (DynamicCache(config=model.config), PreallocatedCache(model.config, 50)):
        torch.manual_seed(0)
        arguments = {"attention_mask": mask, "max_new_tokens": 25, "pad_token_id": 0} | WAYS[way]
        outputs.append(model.generate(ids, past_key_values=cache, **arguments))
    assert torch.equal(*outputs)
    assert cache.get_seq_length() >= 44


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,), (7,), (30, 1, 2)])
def test_chunks_in_one_place(sizes):
    model, ids = interpolate_rope(tiny_llama(), method="linear", factor=2), random_ids(2, 100)
    expected = model(ids, use_cache=False).logits
    cache = PreallocatedCache(model.config, 100)
    logits, _ = read_in_chunks(model, ids[:, :50], sizes, cache=cache)
    places = pointers(cache)
    rest, _ = read_in_chunks(model, ids[:, 50:], sizes, cache=cache)
    torch.testing.assert_close(torch.cat((logits, rest), dim=1), expected, atol=3e-4, rtol=1e-4)
    assert pointers(cache) == places
    with pytest.raises(LongpatchError, match="full: 100 tokens are held, 1 more"):
        model(ids[:, :1], past_key_values=cache)
    assert [layer.length for layer in cache.layers] == [100, 100]


@torch.no_grad()
def test_crop_reorder_and_batch_operations():
    model, ids = tiny_llama(), random_ids(3, 40)
    ours, theirs = PreallocatedCache(model.config, 64), DynamicCache(config=model.config)
    for cache in (ours, theirs):
        model(ids[:, :30], past_key_values=cache)
        cache.crop(-7)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 3]))
    a, b = (model(ids[:, 23:], past_key_values=cache).logits for cache in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    ours.crop(10)
    assert ours.get_seq_length() == 10
    place = pointers(ours)
    ours.reset()
    assert torch.equal(model(ids, past_key_values=ours).logits, model(ids).logits)
    assert pointers(ours) == place


@torch.no_grad()
def test_sliding_layers_keep_their_window():
    model = tiny_llama()
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(**{**model.config.to_dict(), "sliding_window": 8, "model_type": "mistral"})
    model, ids = MistralForCausalLM(config).eval(), random_ids(1, 40)
    expected = model(ids, use_cache=False).logits
    logits, _ = read_in_chunks(model, ids, (11, 1), cache=PreallocatedCache(config, 40))
    torch.testing.assert_close(logits, expected, atol=3e-4, rtol=1e-4)


@torch.no_grad()
def test_two_compilations_serve_all_lengths():
    """One for the first length, one for every other, in a second cache too; neither with a break."""
    torch._dynamo.reset()
    model, ids, counter = tiny_llama(), random_ids(1, 40), CompileCounter()
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        cache = PreallocatedCache(model.config, 40)
        logits = [model(ids[:, :30], past_key_values=cache).logits]
        logits += [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=3e-4, rtol=1e-4)
    assert counter.frame_count == 2


def fill_two_layers(config, places, asked):
    """A cache whose first layer has its keys on one device, its second on another; two updates of either."""
    cache = PreallocatedCache(config, 16, device=asked)
    shape = (1, config.num_key_value_heads, 3, config.head_dim)
    for layer, place in enumerate(places):
        for number in (1, 2):
            new = torch.full(shape, float(number), device=place)
            keys, values = cache.update(new, -new, layer)
        assert keys.shape == values.shape == (1, config.num_key_value_heads, 6, config.head_dim)
        assert keys.device == values.device == torch.device(place)
        assert cache.layers[layer].keys.device == torch.device(asked or place)
        yield keys, values


def test_each_layer_is_where_its_keys_are():
    """The second device is PyTorch's one for shapes without numbers."""
    assert len(list(fill_two_layers(tiny_llama().config, ("cpu", "meta"), None))) == 2


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("asked", [None, "cpu", "cuda:0"])
def test_layers_on_two_devices(asked):
    for keys, values in fill_two_layers(tiny_llama().config, ("cpu", "cuda:0"), asked):
        assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]
        assert torch.equal(values, -keys)


@pytest.mark.gpu
@needs_a_gpu
@torch.no_grad()
def test_layers_that_do_not_run_wait_on_the_cpu():
    model, ids = tiny_llama(num_hidden_layers=6).cuda(), random_ids(2, 20).cuda()
    expected = model.generate(ids, max_new_tokens=25, do_sample=False)
    cache = PreallocatedCache(model.config, 50, offloading=True)
    written = model.generate(ids, past_key_values=cache, max_new_tokens=25, do_sample=False)
    assert torch.equal(written, expected)
    assert [layer.keys.device.type for layer in cache.layers].count("cuda") <= 2  # the next one, and the last


def test_gradients_stay_out_of_the_cache():
    model, ids = tiny_llama(), random_ids(1, 40)
    cache = PreallocatedCache(model.config, 40)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    model(ids[:, 20:], past_key_values=cache).logits.sum().backward()
    ours = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    model(ids[:, 20:], past_key_values=cache).logits.sum().backward()
    torch.testing.assert_close(ours, model.model.layers[0].self_attn.k_proj.weight.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_is_what_it_takes(dtype):
    model = tiny_llama(dtype=dtype)
    cache = PreallocatedCache(model.config, 500)
    model(random_ids(3, 5), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == PreallocatedCache.memory_bytes(model.config, 500, batch=3, dtype=dtype)
    storages = [layer.keys.untyped_storage() for layer in cache.layers]
    assert sum(storage.nbytes() for storage in storages) == held
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert model(random_ids(3, 5), past_key_values=cache).logits.shape[1] == 5


@torch.no_grad()
def test_layers_that_have_their_memory_are_not_asked_for_again(monkeypatch):
    """With a little more than all layers need, and less free after each."""
    config = tiny_llama(num_hidden_layers=10).config
    cache = PreallocatedCache(config, 64)
    free = int(1.1 * PreallocatedCache.memory_bytes(config, 64))

    def left(device):
        taken = sum(2 * layer.keys.nbytes for layer in cache.layers if layer.is_initialized)
        return free - taken

    monkeypatch.setattr("longpatch.preallocated.free_bytes", left)
    heads, dim = config.num_key_value_heads, config.head_dim
    for layer in range(10):
        cache.update(torch.zeros(1, heads, 3, dim), torch.zeros(1, heads, 3, dim), layer)
    assert cache.get_seq_length() == 3


def test_what_does_not_fit_is_refused_before_it_is_taken():
    model = tiny_llama()
    cache = PreallocatedCache(model.config, 10**12)
    with pytest.raises(LongpatchError, match=r"for 1,000,000,000,000 tokens in 1 rows, .* are free"):
        model(random_ids(1, 5), past_key_values=cache)
    assert not any(layer.is_initialized for layer in cache.layers)
    with pytest.raises(LongpatchError, match="max_length=0"):
        PreallocatedCache(model.config, 0)
    if not torch.accelerator.is_available():
        with pytest.raises(LongpatchError, match="offloading=True"):
            PreallocatedCache(model.config, 10, offloading=True)


@torch.no_grad()
def test_the_instance_counts_that_is_converted_not_what_was_saved(tmp_path):
    model, ids = convert_model(tiny_llama(), 16, 2), random_ids(1, 5)
    with pytest.raises(LongpatchError, match="past_key_values is a PreallocatedCache"):
        model(ids, past_key_values=PreallocatedCache(model.config, 10))
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain(ids, past_key_values=PreallocatedCache(plain.config, 10)).past_key_values.get_seq_length() == 5


@torch.no_grad()
def test_another_number_of_rows_needs_a_reset():
    model = tiny_llama()
    cache = PreallocatedCache(model.config, 20)
    model(random_ids(3, 10), past_key_values=cache)
    held = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(LongpatchError, match="3 rows are held, 1 are to be added"):
        model(random_ids(1, 5), past_key_values=cache)
    assert [layer.length for layer in cache.layers] == [10, 10]
    assert all(
        torch.equal(layer.keys[:, :, :10], before[:, :, :10]) for layer, before in zip(cache.layers, held, strict=True)
    )
    cache.reset()
    logits = model(random_ids(1, 10), past_key_values=cache).logits
    assert torch.equal(logits, model(random_ids(1, 10), use_cache=False).logits)


SHAPE = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {
    "one": {"multi_query": True},
    "one for each query": {"multi_query": False},
    "two, kept for each query": {"num_kv_heads": 2, "new_decoder_architecture": True},
}


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS)
def test_the_formula_of_falcon(heads):
    model = AutoModelForCausalLM.from_config(FalconConfig(**SHAPE, **HEADS[heads])).eval()
    cache = PreallocatedCache(model.config, 40)
    model(random_ids(2, 5), past_key_values=cache)
    held = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    assert held == PreallocatedCache.memory_bytes(model.config, 40, batch=2)


def test_there_is_no_formula_for_compressed_keys():
    with pytest.raises(LongpatchError, match="deepseek_v3 compresses keys"):
        PreallocatedCache.memory_bytes(DeepseekV3Config(), 40)
