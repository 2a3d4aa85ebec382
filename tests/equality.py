"""What the tests of `lambda_attention` on a CPU share: calls of some size, and how close to the definition is close."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st

from longpatch_kernels import blocked, lambda_attention, native
from longpatch_kernels.native.build import library
from tests.cases import build, cases, compare, error, run

needs_compiler = pytest.mark.skipif(isinstance(library(), str), reason=f"{library()}")

# what runs in blocks, within the window and in decode steps, up to sizes where blocks, stretches and tails all occur
PLAIN = {"softcap": st.none(), "alibi": st.just(False), "through_lse": st.just(False)}
LONG = cases(
    batch=st.sampled_from([1, 1, 2]),
    group=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([16, 64]),
    queries=st.integers(17, 2200),
    cached=st.sampled_from([0, 0, 1, 130, 1100]),
    window=st.sampled_from([40, 200, 768, 777, 1024]),
    sinks=st.sampled_from([0, 10]),
    **PLAIN,
)
WITHIN = cases(
    group=st.sampled_from([1, 3]),
    queries=st.integers(1, 900),
    cached=st.just(0),
    window=st.integers(900, 1000),
    ring=st.none(),
    padding=st.just(False),
    recalled=st.just(False),
    **PLAIN,
)
STEP = cases(
    batch=st.integers(1, 5),
    key_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([64, 128]),
    queries=st.sampled_from([1, 1, 1, 2, 4]),
    cached=st.sampled_from([1, 70, 2100, 9000]),
    window=st.sampled_from([1, 64, 2048]),
    sinks=st.sampled_from([0, 10]),
    **PLAIN,
)


def check_float32(implementation, case):
    compare(build(case, torch.float32), implementation, case["through_lse"])


def check_half(implementation, case, dtype):
    arguments = build(case, dtype)
    expected = run(arguments, "reference", torch.float64, case["through_lse"])
    dense = run(arguments, "reference", through_lse=case["through_lse"])

    def compare_with(actual, names):
        for name in names:
            bound = 2 * error(dense[name], expected[name]) + 0.004 * expected[name].abs().max().item()
            assert error(actual[name], expected[name]) <= max(bound, 2e-5), name  # never stricter than float32's rule

    compare_with(run(arguments, implementation, through_lse=case["through_lse"]), expected.keys() - {"lse"})
    # with gradients it is computed in float32, without them in the dtype itself
    with ExitStack() as stack, torch.no_grad():
        modules = native, blocked.decode, blocked.causal, blocked.products
        ran = [stack.enter_context(patch.object(m, "forward", wraps=m.forward)) for m in modules]
        out, lse = lambda_attention(**arguments, implementation=implementation)
    assert [call.args[0].query.dtype for function in ran for call in function.call_args_list] == [dtype]
    compare_with({"out": out}, ["out"])
    assert error(lse, expected["lse"]) < 2e-2


def long_call(queries=2000, window=800):
    """A batch of two with different left padding, grouped heads and sinks that follow the padding."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(2, heads, tokens, 16, generator=generator)
        for name, heads, tokens in (
            ("query", 6, queries),
            ("key", 2, queries),
            ("value", 2, queries),
            ("query_far", 6, queries),
            ("key_far", 2, 4),
            ("value_far", 2, 4),
        )
    }
    first_valid = torch.tensor([0, 61])
    return tensors | {
        "window": window,
        "first_valid": first_valid,
        "far_positions": first_valid[:, None] + torch.arange(4),
    }
