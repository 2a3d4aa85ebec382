"""`lambda_attention` in PyTorch alone, on a CPU, against the dense definition in float64: outputs and gradients."""

from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longpatch_kernels import attention, blocked, explain, lambda_attention
from longpatch_kernels.blocked import folded
from longpatch_kernels.blocked.block import Block
from longpatch_kernels.native.build import library
from tests.cases import cases, compare
from tests.equality import LONG, PLAIN, STEP, WITHIN, check_float32, check_half, long_call

pytestmark = pytest.mark.usefixtures("poisoned")


@given(case=cases())
def test_float32_equals_the_definition(case):
    check_float32("blocked", case)


@pytest.mark.parametrize(
    ("name", "drawn", "examples"),
    [
        ("products", LONG.filter(lambda case: case["cached"] or case["queries"] > case["window"]), 15),
        ("causal", WITHIN, 12),
        ("decode", STEP, 25),
    ],
)
def test_each_cpu_algorithm_equals_the_definition(name, drawn, examples):
    @settings(max_examples=examples)
    @given(case=drawn)
    def check(case):
        algorithm = getattr(blocked, name)
        with (
            patch.object(algorithm, "forward", wraps=algorithm.forward) as forward,
            patch.object(blocked.causal, "backward", wraps=blocked.causal.backward) as of_pytorch,
            patch.object(blocked.products, "backward", wraps=blocked.products.backward) as backward,
        ):
            check_float32("blocked", case)
        assert forward.call_count == 1
        assert of_pytorch.call_count == (name == "causal")
        assert backward.call_count == (name != "causal")

    check()


FOLDED = cases(
    group=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([16, 64]),
    queries=st.integers(800, 1500),
    cached=st.sampled_from([0, 1, 130, 600]),
    window=st.sampled_from([400, 501, 640]),
    sinks=st.sampled_from([0, 10]),
    **PLAIN,
)


@settings(max_examples=12)
@given(case=FOLDED)
def test_wide_windows_folded_around_what_many_queries_see(case):
    with (
        patch.object(folded, "LEAST_WINDOW", 400),
        patch.object(folded, "LEAST_KEYS", 16),
        patch.object(folded, "ROWS", 384),
        patch.object(folded, "_fold", wraps=folded._fold) as fold,
    ):
        check_float32("blocked", case | {"padding": False, "ring": None})
        assert fold.call_count
        check_float32("blocked", case)


@pytest.mark.parametrize("key_heads", [1, 3])
def test_neighbouring_blocks_of_one_head_equal_the_definition(key_heads, monkeypatch):
    """Key heads that threads cannot share out evenly: in backward, too, the keys of neighbours overlap."""
    settled = {"batch": 2, "key_heads": key_heads, "group": 2, "head_dim": 16, "queries": 900, "cached": 30}
    settled |= {"window": 200, "sinks": 4, "recalled": True, "extra_distance": 0, "ring": None, "padding": False}
    settled |= {"far_mask": True, "softcap": None, "alibi": False, "through_lse": True, "seed": 5}
    counts, add = [], Block.add_to_keys

    def recording(block, *arguments):
        counts.append(block.count)
        add(block, *arguments)

    monkeypatch.setattr(Block, "add_to_keys", recording)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_float32("blocked", settled)
    finally:
        torch.set_num_threads(before)
    assert max(counts) > 1


@given(case=cases())
def test_bfloat16_is_as_good_as_the_dense_version(case):
    check_half("blocked", case, torch.bfloat16)


@settings(max_examples=15)
@given(case=cases() | LONG | STEP)
def test_float16_is_as_good_as_the_dense_version(case):
    check_half("blocked", case, torch.float16)


@pytest.mark.parametrize("queries", [1, 50, 1100])
@pytest.mark.parametrize("group", [1, 3])
def test_a_wide_window_is_causal_attention(queries, group):
    query = torch.randn(2, 2 * group, queries, 16)
    key, value = torch.randn(2, 2, 2, queries, 16).unbind()
    out, _ = lambda_attention(query, key, value, window=queries, implementation="blocked")
    causal = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, causal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["blocked", "auto"])
@pytest.mark.parametrize("window", [9, 100])
def test_tensors_may_lie_in_memory_as_they_like(implementation, window):
    """Numbers of a row apart from each other, tokens before heads, keys shared by a batch, a strided `first_valid`."""
    columns = torch.randn(2, 4, 16, 40).transpose(2, 3)
    tokens = torch.randn(2, 40, 4, 16).transpose(1, 2)
    shared = torch.randn(1, 4, 40, 16).expand(2, -1, -1, -1)
    sinks = torch.randn(1, 4, 16, 3).transpose(2, 3).expand(2, -1, -1, -1)
    call = {"key": columns, "value": columns, "query_far": columns, "key_far": sinks, "value_far": sinks}
    for changed in ({"query": columns}, {"query": tokens, "key": shared}, {"query": tokens, "value": tokens}):
        arguments = call | changed | {"window": window, "first_valid": torch.tensor([[3, 0], [0, 0]])[:, 0]}
        for through_lse in (False, True):
            compare(arguments, implementation, through_lse)
        with torch.no_grad():
            found = lambda_attention(**arguments, implementation=implementation)
            wanted = lambda_attention(**arguments, implementation="reference")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_place_in_the_ring_past_its_end_is_taken_modulo():
    query, key, value = (torch.randn(1, 2, n, 32) for n in (1, 50, 50))
    outs = [lambda_attention(query, key, value, window=50, ring_start=torch.tensor(start))[0] for start in (3, 53)]
    assert torch.equal(*outs)


def test_the_window_beyond_the_keys_costs_nothing():
    """Masks are as wide as the keys there are."""
    query, key = torch.randn(1, 2, 100, 32), torch.randn(1, 2, 200, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        lambda_attention(query, key, key, window=10**6, implementation="blocked")
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**20


def test_chunks_over_a_cache_equal_one_call():
    call = long_call()
    whole, whole_lse = lambda_attention(**call)
    for start, stop in ((0, 900), (900, 901), (901, 905), (905, 2000)):
        first = max(0, start - 800)  # keys that no query of the chunk can see are not handed over
        chunk = call | {name: call[name][:, :, start:stop] for name in ("query", "query_far")}
        chunk |= {name: call[name][:, :, first:stop] for name in ("key", "value")}
        chunk |= {name: call[name] - first for name in ("first_valid", "far_positions")}
        out, lse = lambda_attention(**chunk)
        torch.testing.assert_close(out, whole[:, :, start:stop], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, whole_lse[:, :, start:stop], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_of_a_batch_equals_the_row_alone(row):
    call = long_call()
    padding = int(call["first_valid"][row])
    alone = {name: call[name][row : row + 1] for name in ("key_far", "value_far")}
    alone |= {name: call[name][row : row + 1, :, padding:] for name in ("query", "key", "value", "query_far")}
    out, lse = lambda_attention(**call)
    out_alone, lse_alone = lambda_attention(**alone, window=call["window"])
    torch.testing.assert_close(out[row : row + 1, :, padding:], out_alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse[row : row + 1, :, padding:], lse_alone, atol=1e-6, rtol=1e-5)
    assert (lse[row, :, :padding] == -torch.inf).all()


def test_the_rule_between_algorithms():
    def chosen(queries, keys, dtype=torch.float32, group=1, **options):
        query, key = torch.zeros(1, 2 * group, queries, 8, dtype=dtype), torch.zeros(1, 2, keys, 8, dtype=dtype)
        return explain(query, key, key, window=64, **options).splitlines()[0]

    assert chosen(1, 500) == chosen(16, 500) == chosen(1, 500, group=32) == "auto runs blocked: decode"
    assert chosen(1, 1) == chosen(64, 64) == "auto runs blocked: causal"
    assert chosen(17, 500) == chosen(2, 500, group=9) == "auto runs blocked: products"
    assert chosen(17, 500, dtype=torch.bfloat16) == "auto runs blocked: products"
    assert chosen(64, 64, dtype=torch.float64) == chosen(1, 500, softcap=3.0) == "auto runs blocked: products"
    for key_count, window, preferred in (
        (2048, 64, "native"),
        (2048, 2048, "blocked: causal"),
        (12, 8, "blocked: products"),
    ):
        tensor = torch.zeros(1, 2, key_count, 16)
        first = explain(tensor, tensor, tensor, window=window).splitlines()[0]
        assert first == f"auto runs {preferred}" or isinstance(library(), str)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "alibi_slopes": torch.ones(6), "far_distance": 50}])
def test_a_far_segment_of_no_keys_is_none(options):
    call = long_call(60, 20)
    none = {name: call[name][:, :, :0] for name in ("key_far", "value_far")}
    none |= {"far_positions": call["far_positions"][:, :0]}
    near = {name: call[name].clone().requires_grad_() for name in ("query", "key", "value")}
    out, lse = lambda_attention(**(call | near | none | options))
    (out.sum() + lse[:, :, 61:].sum()).backward()
    options = {name: value for name, value in options.items() if name != "far_distance"}
    wanted = lambda_attention(**near, window=20, first_valid=call["first_valid"], **options)
    torch.testing.assert_close((out, lse), wanted)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("window", [30, 9])
def test_any_scale_will_do(scale, window):
    query = torch.randn(1, 2, 30, 16)
    found = lambda_attention(query, query, query, window=window, scale=scale)
    wanted = lambda_attention(query, query, query, window=window, scale=scale, implementation="reference")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_call_like_one_before_is_not_checked_again_and_any_other_is(monkeypatch):
    checked = Mock(wraps=attention.checked_inputs)
    monkeypatch.setattr(attention, "checked_inputs", checked)
    monkeypatch.setattr(attention, "_chosen", {})
    call = long_call(60, 20)
    first = lambda_attention(**call)
    call["key"] = call["key"] + 1
    again = lambda_attention(**call)
    assert checked.call_count == 1
    assert torch.equal(again[0], lambda_attention(**call, implementation="native")[0]) or isinstance(library(), str)
    assert not torch.equal(again[0], first[0])
    checked.reset_mock()
    for changed, reason in (
        ({"ring_start": 60}, "ring_start is 60"),
        ({"window": 0}, "window is 0"),
        ({"window": 20.0}, "window is 20.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"far_positions": torch.zeros(3)}, "far_positions has shape"),
        ({"first_valid": torch.zeros(3)}, "first_valid has shape"),
        ({"value": call["value"].double()}, "differ in dtype"),
        ({"key_far": None}, "come together"),
        ({"key": call["key"][0]}, "key has shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            lambda_attention(**(call | changed))
    assert len(attention._chosen) == 1
    lambda_attention(**call, ring_start=7)
    lambda_attention(**call, ring_start=8)
    assert checked.call_count == 9
    monkeypatch.setattr(attention, "MOST_CALLS", 2)
    for window in range(21, 26):
        lambda_attention(**(call | {"window": window}))
        assert len(attention._chosen) <= 2


def test_wrong_arguments_are_all_listed():
    query, key = torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 2, 8)
    with pytest.raises(ValueError, match="lambda_attention") as caught:
        lambda_attention(query, key, key, window=0, key_far=key, ring_start=5, softcap=-1.0)
    for part in (
        "multiple of the 2 key heads",
        "4 queries but 2 keys",
        "window is 0",
        "come together",
        "ring_start",
        "softcap",
    ):
        assert part in str(caught.value)
    good = torch.zeros(1, 2, 4, 8)
    far = {"query_far": good, "key_far": good, "value_far": good}
    for changed, part in (
        ({"query": good[:0], "key": good[:0], "value": good[:0]}, "no rows"),
        ({"key": good[:, :0], "value": good[:, :0]}, "no heads"),
        ({"value": good.double()}, "differ in dtype: torch.float32, torch.float32, torch.float64"),
        ({"window": 2.5}, "window is 2.5, expected a whole number"),
        ({"far_mask": good > 0, "far_distance": 3}, "far_mask without far keys; far_distance without far keys"),
        (far | {"far_mask": torch.ones(1, 2, 4, 4)}, "far_mask is torch.float32, expected torch.bool"),
    ):
        with pytest.raises(ValueError, match="lambda_attention") as caught:
            lambda_attention(**({"query": good, "key": good, "value": good, "window": 2} | changed))
        assert part in str(caught.value)
    with pytest.raises(
        ValueError, match="unknown; known are auto, triton, native, blocked, flash_attn, xformers, flex, reference"
    ):
        lambda_attention(query, query, query, window=1, implementation="magic")
