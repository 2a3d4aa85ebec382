"""Every implementation of `lambda_attention` against the dense definition in float64: outputs and gradients."""

import pytest
import torch
from cases import CASES, build, error, run
from hypothesis import given

from longpatch_kernels import lambda_attention

FAST = ["blocked"]  # the others have tests of their own


@pytest.mark.parametrize("implementation", FAST)
@given(case=CASES)
def test_float32_equals_the_definition(implementation, case):
    arguments = build(case, torch.float32)
    expected = run(arguments, "reference", torch.float64)
    actual = run(arguments, implementation)
    for name, reference in expected.items():
        largest = reference[reference > -torch.inf].abs().max().item() if (reference > -torch.inf).any() else 0.0
        assert error(actual[name], reference) < 2e-5 * max(1.0, largest), name


@pytest.mark.parametrize("implementation", FAST)
@given(case=CASES)
def test_bfloat16_is_as_good_as_the_dense_version(implementation, case):
    arguments = build(case, torch.bfloat16)
    expected = run(arguments, "reference", torch.float64)
    dense = run(arguments, "reference")
    actual = run(arguments, implementation)
    for name in expected.keys() - {"lse"}:
        bound = 2 * error(dense[name], expected[name]) + 0.004 * expected[name].abs().max().item()
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
    with pytest.raises(ValueError, match=r"unknown; known are auto, .*reference"):
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
