"""What recall remembers: where it lies, how much it is, copies and files of it."""

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from longpatch import LambdaCache, LongpatchError
from longpatch.evaluation.cachefile import load_cache, save_cache
from longpatch.evaluation.perplexity import cache_bytes
from longpatch.recall import blocks, memory, search, segment
from tests.recalling import SINKS, WINDOW, both_modes, close, converted
from tests.tiny import random_ids, read_in_chunks


@pytest.fixture
def short_segments(monkeypatch):
    for module in (memory, blocks, search, segment):
        monkeypatch.setattr(module, "SEGMENT_TOKENS", 16)


@both_modes
@torch.no_grad()
def test_storage_and_segments(mode, tmp_path, short_segments):
    """CPU and disk hold what the device holds, in several segments; files are safetensors and go with the cache."""
    ids = random_ids(2, 90)
    expected, _ = read_in_chunks(converted(mode), ids, (30, 1, 7))
    for storage in ("cpu", "disk"):
        folder = str(tmp_path) if storage == "disk" else None
        model = converted(replace(mode, storage=storage, folder=folder))
        actual, cache = read_in_chunks(model, ids, (30, 1, 7))
        assert torch.equal(actual, expected)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 * 6  # two layers, 90 tokens in segments of 16
    with safe_open(files[0], framework="pt") as file:
        held = cache.layers[0].memory.segments[0].tensors["keys"]
        found = [file.get_tensor("keys")] + [safe_open(path, framework="pt").get_tensor("keys") for path in files[1:]]
        assert any(torch.equal(keys, held) for keys in found)
    del cache
    gc.collect()
    assert not list(tmp_path.iterdir())


@both_modes
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and copies that nobody waits for need a GPU")
@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_a_gpu_recalls_what_the_cpu_does(mode, bits, tmp_path):
    ids = random_ids(2, 90)
    expected, _ = read_in_chunks(converted(replace(mode, bits=bits)), ids, (30, 1, 7))
    for storage in ("device", "cpu", "disk"):
        folder = str(tmp_path) if storage == "disk" else None
        model = converted(replace(mode, bits=bits, storage=storage, folder=folder)).cuda()
        actual, cache = read_in_chunks(model, ids[:, :60].cuda(), (30, 1, 7))
        cache.reorder_cache(torch.tensor([1, 0]).cuda())
        rest, _ = read_in_chunks(model, ids[[1, 0], 60:].cuda(), (30, 1, 7), cache=cache)
        close(torch.cat((actual, rest[[1, 0]]), dim=1).cpu(), expected)
        held = cache.memories()[0].segments[0].tensors["keys"]
        assert (held.is_cuda, held.is_pinned()) == (storage == "device", storage == "cpu")


@both_modes
@torch.no_grad()
def test_eight_bits(mode):
    """Every number is within half a level of its scale; the model's output moves a little, the memory is a quarter."""
    ids = random_ids(1, 80)
    expected, plain = read_in_chunks(converted(mode), ids, (40,))
    actual, small = read_in_chunks(converted(replace(mode, bits=8)), ids, (40,))
    tensors, exact = (cache.layers[0].memory.segments[0].tensors for cache in (small, plain))
    for name in ("keys", "values"):
        assert tensors[name].dtype == torch.int8
        rounded = tensors[name] * tensors[f"{name}_scale"]
        assert (rounded - exact[name]).abs().le(0.51 * tensors[f"{name}_scale"])[:, :, :80].all()
    assert tensors["keys"].nbytes * 4 == exact["keys"].nbytes
    assert not torch.equal(actual, expected)
    agree = actual.argmax(-1) == expected.argmax(-1)
    assert agree.float().mean() > 0.8


@both_modes
@pytest.mark.parametrize("queries", [1, 5, None])
@torch.no_grad()
def test_max_tokens_bounds_the_memory(mode, queries, short_segments):
    """However long the text, and read in one forward too unless every query recalls; representatives included."""
    most = 20
    model, chunk = converted(replace(mode, max_tokens=most, queries=queries)), 10
    asking = queries or chunk
    segments = -(-(most + WINDOW + 8 + asking + chunk) // 16) + 1
    key_bytes = 2 * 16 * 4  # of one token
    blocks = 0 if mode.block_tokens == 1 else 2 * key_bytes * 16 // mode.block_tokens
    bound = segments * (16 * 2 * key_bytes + blocks)
    ids, cache, held = random_ids(1, 400), LambdaCache(model.config), []
    for start in range(0, 400, chunk):
        model(ids[:, start : start + chunk], past_key_values=cache)
        held.append(cache.memories()[0].nbytes)
    assert max(held) <= bound
    assert max(held[-8:]) == max(held[-16:-8])  # sixteen forwards, ten segments
    recalled = model.longpatch.recalled(cache)[0]
    latest = 400 - 1 - WINDOW
    assert recalled.max() <= latest
    last_query = recalled[:, :, -1]
    assert last_query[last_query >= 0].min() > latest - most

    whole = model(ids).past_key_values
    read_in_chunks(model, random_ids(1, 2), (1,), cache=whole)
    assert whole.memories()[0].nbytes <= bound
    if queries is not None:
        assert model(ids).past_key_values.memories()[0].nbytes <= bound


@both_modes
@pytest.mark.parametrize("storage", ["device", "disk"])
@torch.no_grad()
def test_taking_back_beams_and_batches(mode, storage):
    model = converted(replace(mode, storage=storage))
    ids = random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    _, cache = read_in_chunks(model, ids[:, :66], (66,), mask)
    cache.crop(-6)
    close(read_in_chunks(model, ids[:, 60:], (10,), mask, cache)[0][0], whole[0, 60:])
    cache.crop(-8)
    cache.batch_repeat_interleave(2)
    close(read_in_chunks(model, ids[[0, 0, 1, 1], 62:64], (1,), mask[[0, 0, 1, 1]], cache)[0][0], whole[0, 62:64])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert model.longpatch.recalled(cache)[0].shape[0] == 2
    close(read_in_chunks(model, ids[[1, 0], 64:], (6,), mask[[1, 0]], cache)[0], whole[[1, 0], 64:])
    cache.reset()
    close(read_in_chunks(model, ids, (70,), mask, cache)[0][0], whole[0])
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@both_modes
@pytest.mark.parametrize("change", [{}, {"max_tokens": 20}, {"bits": 8, "storage": "disk"}], ids=str)
@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(mode, change, short_segments, tmp_path):
    """Each has its files: both go on, by turns, with texts of their own, and the copy outlives the original."""
    folder = {"folder": str(tmp_path)} if "storage" in change else {}
    model, ids, other = converted(replace(mode, **change, **folder)), random_ids(1, 120), random_ids(1, 120, 5)
    expected, of_twin = (
        read_in_chunks(model, text, (20,))[0][:, 60:] for text in (ids, torch.cat((ids[:, :60], other[:, 60:]), dim=1))
    )
    cache = read_in_chunks(model, ids[:, :60], (20,))[1]
    twin = copy.deepcopy(cache)
    assert model.longpatch.recalled(twin).keys() == {0, 1}
    for start in (60, 80, 100):
        for text, logits, each in ((ids, expected, cache), (other, of_twin, twin)):
            actual = read_in_chunks(model, text[:, start : start + 20], (20,), cache=each)[0]
            close(actual, logits[:, start - 60 : start - 40])
    del cache, each
    gc.collect()
    twin.crop(-8)
    close(read_in_chunks(model, other[:, 112:], (8,), cache=twin)[0], of_twin[:, -8:])
    if "storage" in change:
        with pytest.raises(LongpatchError, match=r"storage='disk' go with their cache.*deepcopy"):
            pickle.dumps(twin)
    del twin
    gc.collect()
    assert not list(tmp_path.iterdir())


@both_modes
@pytest.mark.parametrize("change", [{}, {"bits": 8}, {"storage": "disk"}], ids=["as it is", "8 bits", "disk"])
@torch.no_grad()
def test_a_cache_in_a_file_keeps_what_it_remembers(mode, change, tmp_path, short_segments):
    model, ids = converted(replace(mode, **change)), random_ids(2, 60)
    _, cache = read_in_chunks(model, ids[:, :50], (20,))
    save_cache(cache, tmp_path / "cache.safetensors")
    again = load_cache(model, tmp_path / "cache.safetensors")
    expected, _ = read_in_chunks(model, ids[:, 50:], (4,), cache=cache)
    close(read_in_chunks(model, ids[:, 50:], (4,), cache=again)[0], expected)
    assert model.longpatch.recalled(again)[0].max() >= SINKS


@both_modes
@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_bytes_are_those_of_the_formula(mode, bits, monkeypatch):
    """Sinks and ring, and in every layer whole segments; block mode: two keys in float32 a block that was left."""
    for module in (memory, blocks, search, segment):
        monkeypatch.setattr(module, "SEGMENT_TOKENS", 64)
    model = converted(replace(mode, bits=bits, queries=1))
    cache = LambdaCache(model.config)
    read_in_chunks(model, random_ids(2, 400), (400, 1), cache=cache)
    layers, rows, heads, dim, number = 2, 2, 2, 16, 4 if bits is None else 1 + 4 / 16
    ring = 2 * rows * heads * dim * 4 * (2 * SINKS + WINDOW + 8)
    for count in (400, 460):
        if count > 400:
            read_in_chunks(model, random_ids(2, 60), (1,), cache=cache)
        remembered = 2 * rows * heads * dim * number * 64 * -(-(count - SINKS) // 64)
        if mode.block_tokens > 1:
            left = -(-(count - SINKS - WINDOW) // 64)  # segments with a token that left the window
            remembered += 2 * rows * heads * dim * 4 * left * 64 // mode.block_tokens
        assert cache_bytes(cache) == layers * (ring + remembered)
