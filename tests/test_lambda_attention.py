"""Every implementation of `lambda_attention` against the dense definition in float64: outputs and gradients."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longpatch_kernels import IMPLEMENTATIONS, blocked, lambda_attention

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "key_heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 2, 8]),
        "head_dim": st.sampled_from([64, 100, 128]),
        "queries": st.integers(1, 5) | st.integers(1, 300),
        "cached": st.sampled_from([0, 0, 1, 7, 130]),
        "window": st.integers(1, 9) | st.integers(1, 400),
        "sinks": st.sampled_from([0, 1, 10]),
        "extra_distance": st.sampled_from([0, 50]),
        "ring": st.booleans(),
        "padding": st.booleans(),
        "far_mask": st.booleans(),
        "softcap": st.sampled_from([None, 5.0]),
        "alibi": st.booleans(),
        "through_lse": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)

# what runs in bands and in decode steps, up to sizes where the kernel's tiles, blocks and tails all occur
PLAIN = {"softcap": st.none(), "alibi": st.just(False), "through_lse": st.just(False)}
LONG = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([1, 1, 2]),
        "key_heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 3]),
        "head_dim": st.sampled_from([16, 64]),
        "queries": st.integers(17, 2200),
        "cached": st.sampled_from([0, 0, 1, 130, 1100]),
        "window": st.sampled_from([40, 200, 768, 777, 1024]),
        "sinks": st.sampled_from([0, 10]),
        "extra_distance": st.just(0),
        "ring": st.booleans(),
        "padding": st.booleans(),
        "far_mask": st.booleans(),
        "seed": st.integers(0, 2**31),
        **PLAIN,
    }
)
STEP = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 5),
        "key_heads": st.sampled_from([1, 2, 3]),
        "group": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([64, 128]),
        "queries": st.sampled_from([1, 1, 1, 2, 4]),
        "cached": st.sampled_from([0, 1, 70, 2100, 9000]),
        "window": st.sampled_from([1, 64, 2048]),
        "sinks": st.sampled_from([0, 10]),
        "extra_distance": st.just(0),
        "ring": st.booleans(),
        "padding": st.booleans(),
        "far_mask": st.booleans(),
        "seed": st.integers(0, 2**31),
        **PLAIN,
    }
)


def build(case, dtype):
    """Arguments of one call: standard-normal tensors with padding, far keys and a cache in front as the case says."""
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    batch, key_heads, queries, sinks = case["batch"], case["key_heads"], case["queries"], case["sinks"]
    heads, keys = key_heads * case["group"], queries + case["cached"]
    arguments = {
        "query": normal(batch, heads, queries, case["head_dim"]),
        "key": normal(batch, key_heads, keys, case["head_dim"]),
        "value": normal(batch, key_heads, keys, case["head_dim"]),
        "window": case["window"],
        "ring_start": keys // 2 if case["ring"] else 0,
        "softcap": case["softcap"],
    }
    if case["padding"]:
        arguments["first_valid"] = torch.randint(-3, keys, (batch,), generator=generator)
    if case["alibi"]:
        arguments["alibi_slopes"] = torch.rand(heads, generator=generator)
    if sinks:
        arguments |= {
            "query_far": normal(batch, heads, queries, case["head_dim"]),
            "key_far": normal(batch, key_heads, sinks, case["head_dim"]),
            "value_far": normal(batch, key_heads, sinks, case["head_dim"]),
            "far_distance": case["window"] + case["extra_distance"],
        }
        if case["padding"]:
            arguments["far_positions"] = arguments["first_valid"][:, None] + torch.arange(sinks)
        if case["far_mask"]:
            arguments["far_mask"] = torch.rand(batch, heads, queries, sinks, generator=generator) < 0.7
    return arguments


def run(arguments, implementation, dtype=None, through_lse=True):
    """Output, log-sum-exp and the gradients of every floating-point tensor that takes part in the attention."""
    arguments = dict(arguments)
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[name] = value.to(dtype or value.dtype).detach()
            if name != "alibi_slopes":
                leaves[name] = arguments[name].requires_grad_()
    out, lse = lambda_attention(**arguments, implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    loss = (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    if through_lse:
        visible = lse > -torch.inf
        loss = loss + (lse[visible] * torch.randn(lse.shape, generator=generator).to(lse.dtype)[visible]).sum()
    loss.backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def error(actual, expected):
    finite = expected > -torch.inf
    assert torch.equal(actual > -torch.inf, finite)
    return (actual[finite].double() - expected[finite]).abs().max().item() if finite.any() else 0.0


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that what is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check_float32(implementation, case):
    arguments = build(case, torch.float32)
    expected = run(arguments, "reference", torch.float64, case["through_lse"])
    actual = run(arguments, implementation, through_lse=case["through_lse"])
    for name, reference in expected.items():
        largest = reference[reference > -torch.inf].abs().max().item() if (reference > -torch.inf).any() else 0.0
        assert error(actual[name], reference) < 2e-5 * max(1.0, largest), name


@pytest.mark.parametrize("implementation", FAST)
@given(case=CASES)
def test_float32_equals_the_definition(implementation, case):
    check_float32(implementation, case)


@pytest.mark.parametrize(("name", "cases", "examples"), [("banded", LONG, 12), ("decode", STEP, 25)])
def test_each_cpu_algorithm_equals_the_definition(name, cases, examples):
    @settings(max_examples=examples)
    @given(case=cases)
    def check(case):
        algorithm = getattr(blocked, name)
        with (
            patch.object(algorithm, "forward", wraps=algorithm.forward) as forward,
            patch.object(blocked.banded, "backward", wraps=blocked.banded.backward) as backward,
        ):
            check_float32("blocked", case)
        assert forward.call_count == 1
        assert backward.call_count == (name == "banded")

    check()


@pytest.mark.parametrize("implementation", FAST)
@given(case=CASES)
def test_bfloat16_is_as_good_as_the_dense_version(implementation, case):
    arguments = build(case, torch.bfloat16)
    expected = run(arguments, "reference", torch.float64, case["through_lse"])
    dense = run(arguments, "reference", through_lse=case["through_lse"])
    actual = run(arguments, implementation, through_lse=case["through_lse"])
    for name in expected.keys() - {"lse"}:
        bound = 2 * error(dense[name], expected[name]) + 0.004 * expected[name].abs().max().item()
        # backward takes dO·O from the output rounded to bfloat16, off by 2^-9; the scores' gradient inherits that
        bound += 0.0 if name == "out" else 2**-9 * case["head_dim"] ** 0.5
        assert error(actual[name], expected[name]) <= bound, name


def test_a_wide_window_is_causal_attention():
    query, key, value = torch.randn(3, 2, 4, 50, 64).unbind()
    out, _ = lambda_attention(query, key, value, window=50, implementation="blocked")
    causal = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, causal, atol=1e-5, rtol=1e-5)


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
    with pytest.raises(ValueError, match="unknown; known are auto, blocked, reference"):
        lambda_attention(query, query, query, window=1, implementation="magic")


def test_backward_keeps_no_scores():
    """O(n) memory: what autograd saves does not grow with the window."""
    query, key, value = (torch.randn(1, 2, 512, 64, requires_grad=True) for _ in range(3))
    saved = 0

    def count(tensor):
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        lambda_attention(query, key, value, window=256, implementation="blocked")
    assert saved <= 4 * query.numel() + 2 * 512
