"""LambdaCache: what it reports, what it holds, what it gives back."""

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, QuantizedCache, StaticCache

from longpatch import LambdaCache, LongpatchError, convert_llama_model
from longpatch.evaluation.perplexity import cache_bytes
from longpatch_kernels import lambda_attention, not_supported_reasons
from tests.tiny import VOCABULARY, random_ids, read_in_chunks, tiny_llama

WINDOW, SINKS = 12, 3


def converted(**settings):
    return convert_llama_model(tiny_llama(**settings), WINDOW, SINKS, slack=8)


@pytest.fixture(params=[LambdaCache.many_keys, 1], ids=["few keys", "many keys"])
def many_keys(request, monkeypatch):
    """Decode steps by either attention, and whether it is ours."""
    monkeypatch.setattr(LambdaCache, "many_keys", request.param)
    return request.param == 1


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(100,), (1,), (7,), (8, 9, 10), (50, 1), (3, 40)])
@torch.no_grad()
def test_every_way_of_reading_gives_the_same_logits(sizes, many_keys):
    model, ids = converted(), random_ids(2, 100)
    expected = model(ids, use_cache=False).logits
    actual, cache = read_in_chunks(model, ids, sizes)
    close(actual, expected)
    assert cache.get_seq_length() == 100
    assert cache.get_max_length() == -1


@torch.no_grad()
def test_many_keys_are_read_by_our_attention(many_keys, monkeypatch):
    """And only then is it asked, once, whether its kernel is there: the question may compile it."""
    model, calls, questions = converted(), [], []
    _, cache = read_in_chunks(model, random_ids(1, 30), (30,))

    def counted(*args, **options):
        calls.append(options)
        return lambda_attention(*args, **options)

    def asked(*args, **options):
        questions.append(options)
        return not_supported_reasons(*args, **options)

    monkeypatch.setattr("longpatch.decode.lambda_attention", counted)
    monkeypatch.setattr("longpatch.cache.not_supported_reasons", asked)
    for _ in range(2):
        model(random_ids(1, 1), past_key_values=cache)
    assert len(calls) == 2 * many_keys * model.config.num_hidden_layers
    assert len(questions) == many_keys


@torch.no_grad()
def test_left_padded_rows_equal_the_rows_alone(many_keys):
    model, ids = converted(), random_ids(3, 80)
    lengths = torch.tensor([80, 61, 5])
    padded = torch.zeros(3, 80, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        padded[row, 80 - length :] = ids[row, :length]
    mask = (torch.arange(80) >= (80 - lengths)[:, None]).long()
    for sizes in ((80,), (1,), (30, 2, 9)):
        logits, _ = read_in_chunks(model, padded, sizes, mask)
        for row, length in enumerate(lengths.tolist()):
            close(logits[row, 80 - length :], model(ids[row : row + 1, :length], use_cache=False).logits[0])
    together = model.generate(padded, attention_mask=mask, max_new_tokens=30, do_sample=False)
    for row, length in enumerate(lengths.tolist()):
        alone = model.generate(ids[row : row + 1, :length], max_new_tokens=30, do_sample=False)
        assert torch.equal(together[row, 80 - length :], alone[0])


@pytest.mark.parametrize("lengths", [(80, 33), (7, 80, 13, 1), (40, 40)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_right_padded_rows_equal_the_rows_alone(lengths, use_cache):
    """Logits, and gradients of a loss over all rows; rows inside, at and far past the window, or all with padding."""
    model, ids = converted(), random_ids(len(lengths), 80)
    mask = (torch.arange(80) < torch.tensor(lengths)[:, None]).long()
    weights = torch.randn(len(lengths), 80, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    (logits * weights * mask[..., None]).sum().backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length], use_cache=use_cache).logits[0]
        close(logits[row, :length], alone)
        (alone * weights[row, :length]).sum().backward()
    for parameter, gradient in zip(model.parameters(), together, strict=True):
        assert (gradient - parameter.grad).abs().max() < 1e-4 * max(1.0, parameter.grad.abs().max().item())


@torch.no_grad()
def test_continuing_a_conversation():
    """Three turns with a kept cache equal one generation over the whole text; full ids or new ids, with their mask."""
    model, first, second = converted(), random_ids(1, 30), random_ids(1, 20, seed=1)
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 25}
    turn = model.generate(first, **options)
    text = torch.cat((turn.sequences, second), dim=1)
    expected = model.generate(text, **options).sequences
    again = model.generate(text, past_key_values=turn.past_key_values, **options)
    assert torch.equal(again.sequences, expected)
    assert again.past_key_values is turn.past_key_values
    turn = model.generate(first, **options)
    new_ids = text[:, turn.past_key_values.get_seq_length() :]
    again = model.generate(
        new_ids, attention_mask=torch.ones_like(text), past_key_values=turn.past_key_values, **options
    )
    assert torch.equal(again.sequences[:, -25:], expected[:, -25:])


@torch.no_grad()
def test_own_loop_equals_generate():
    model, ids = converted(), random_ids(2, 30)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    output = model(ids)
    for _ in range(40):
        token = output.logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, token), dim=1)
        output = model(token, past_key_values=output.past_key_values)
    assert torch.equal(ids, expected)


@torch.no_grad()
def test_a_generation_past_the_window_equals_one_without_cache():
    model, ids = converted(), random_ids(2, 10)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), expected)
    chunked = model.generate(ids, max_new_tokens=40, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(chunked, expected)


@torch.no_grad()
def test_beams_reorder_the_cache_and_its_padding():
    model, ids = converted(), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 25, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def formula(batch, key_heads, head_dim, layers, bytes_per_number=4):
    return 2 * layers * batch * key_heads * (2 * SINKS + WINDOW + 8) * head_dim * bytes_per_number


def storage_bytes(cache):
    storages = [t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_memory_is_the_documented_formula_after_any_number_of_tokens(static):
    model = converted()
    cache, expected = LambdaCache(model.config, static=static), formula(2, 2, 16, 2)
    for _ in range(4):
        read_in_chunks(model, random_ids(2, 30), (30,), cache=cache)
        assert cache_bytes(cache) == storage_bytes(cache) == expected


@torch.no_grad()
def test_a_short_text_takes_a_short_cache():
    """With the window of a long-context model a short prompt must not take gigabytes."""
    model = convert_llama_model(tiny_llama(), 50_000, 3)
    cache = LambdaCache(model.config)
    for length in (20, 150, 151, 700):
        read_in_chunks(
            model, random_ids(1, length - cache.get_seq_length()), (1 if length == 151 else 1000,), cache=cache
        )
        tokens = max(64, 2 * length) + 2 * SINKS
        assert storage_bytes(cache) <= 2 * 2 * 2 * tokens * 16 * 4


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numel = max(self.numel, tensor.numel())
        return result


@torch.no_grad()
def test_nothing_in_a_decoding_forward_grows_with_the_text():
    model, largest = converted(), []
    for length in (50, 20_000):
        _, cache = read_in_chunks(model, random_ids(1, length), (500,))
        token, mask = random_ids(1, 1), torch.ones(1, length + 1)
        with Largest() as mode:
            model(token, attention_mask=mask, past_key_values=cache)
        largest.append(mode.numel)
    assert largest[0] == largest[1] < 20_000


class CacheMachine(RuleBasedStateMachine):
    """Reads, takes back and re-reads tokens at random; a plain list of ids is the model to compare with."""

    def __init__(self):
        super().__init__()
        self.model, self.cache, self.ids, self.seed, self.longest = converted(), None, [], 0, 0
        self.patch = pytest.MonkeyPatch()

    @initialize(many_keys=st.sampled_from([1, 2048]))
    def choose_attention(self, many_keys):
        self.patch.setattr(LambdaCache, "many_keys", many_keys)

    def teardown(self):
        self.patch.undo()

    @rule(count=st.sampled_from([1, 1, 2, 5, 8, 9, 10, 31]))
    @torch.no_grad()
    def read(self, count):
        self.seed += 1
        new = random_ids(1, count, self.seed)
        output = self.model(new, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        self.ids += new[0].tolist()
        self.longest = max(self.longest, len(self.ids))
        expected = self.model(torch.tensor([self.ids]), use_cache=False).logits[:, -count:]
        close(output.logits, expected)

    @precondition(lambda self: self.ids)
    @rule(count=st.integers(0, 12))
    def take_back(self, count):
        possible = len(self.ids) if self.longest <= WINDOW + 8 else 8 - (self.longest - len(self.ids))
        if count <= possible:
            self.cache.crop(-count)
            self.ids = self.ids[: len(self.ids) - count]
        else:
            with pytest.raises(LongpatchError, match=f"{count} tokens to remove, but the ring can restore {possible}"):
                self.cache.crop(-count)

    @invariant()
    def reports_the_true_length(self):
        assert self.cache is None or self.cache.get_seq_length() == len(self.ids)


TestCacheMachine = CacheMachine.TestCase


@torch.no_grad()
def test_crop_takes_lengths_and_tensors_too():
    """A positive number is the length to keep; assisted decoding of some versions passes tensors."""
    model, ids = converted(), random_ids(1, 30)
    expected, _ = read_in_chunks(model, ids, (30,))
    for crop in (torch.tensor(-5), 25):
        _, cache = read_in_chunks(model, ids, (30,))
        cache.crop(crop)
        close(read_in_chunks(model, ids[:, 25:], (5,), cache=cache)[0], expected[:, 25:])


@torch.no_grad()
def test_batch_operations_and_reset():
    model, ids = converted(), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    whole, _ = read_in_chunks(model, ids, (40,), mask)
    _, cache = read_in_chunks(model, ids[:, :30], (30,), mask)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    rest, _ = read_in_chunks(model, ids[[1, 0], 30:], (10,), mask[[1, 0]], cache=cache)
    close(rest, whole[[1, 0], 30:])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(read_in_chunks(model, ids, (40,), mask, cache=cache)[0], whole)


@torch.no_grad()
def test_a_growing_cache_of_the_user_works_and_is_warned_of():
    model, ids = converted(), random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected, _ = read_in_chunks(model, ids, (60,), mask)
    with pytest.warns(UserWarning, match="DynamicCache, which grows"):
        actual, _ = read_in_chunks(model, ids, (13,), mask, cache=DynamicCache())
    close(actual[0], expected[0])
    close(actual[1, 4:], expected[1, 4:])


def refused_caches():
    config = tiny_llama().config
    yield "StaticCache", StaticCache(config, max_cache_len=64)
    yield "sliding", DynamicCache(config=tiny_llama(layer_types=["sliding_attention"] * 2, sliding_window=8).config)
    yield "other settings", LambdaCache(convert_llama_model(tiny_llama(), 20, 2).config)


@pytest.mark.parametrize(("kind", "cache"), refused_caches(), ids=[kind for kind, _ in refused_caches()])
def test_caches_that_cannot_work_are_refused(kind, cache):
    with pytest.raises(LongpatchError, match="past_key_values"):
        converted()(random_ids(1, 5), past_key_values=cache)


def test_quantised_cache_is_refused():
    class Fake(QuantizedCache):
        def __init__(self):  # the real one needs a quantisation backend
            self.layers = []

        def get_seq_length(self, layer_idx=0):
            return 0

    with pytest.raises(LongpatchError, match="Fake"):
        converted()(random_ids(1, 5), past_key_values=Fake())


@pytest.mark.parametrize("implementation", ["quantized", "sliding_window"])
def test_cache_implementations_of_generate_are_refused(implementation):
    with pytest.raises((LongpatchError, ValueError), match=r"cache_implementation"):
        converted().generate(random_ids(1, 5), max_new_tokens=2, cache_implementation=implementation)


def test_needs_a_converted_model():
    with pytest.raises(LongpatchError, match="no longpatch settings"):
        LambdaCache(tiny_llama().config)
    cache = LambdaCache(converted().config)
    with pytest.raises(LongpatchError, match="not converted"):
        tiny_llama()(random_ids(1, 5), past_key_values=cache)
