"""`lambda_attention` under autograd, `torch.compile`, `torch.autocast` and as an operator of PyTorch."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.autograd import forward_ad

from longpatch_kernels import IMPLEMENTATIONS, lambda_attention
from longpatch_kernels.compiled import TENSORS
from tests.equality import long_call, needs_compiler

pytestmark = pytest.mark.usefixtures("poisoned")


def differentiated(function, tensors, **options):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out, lse = function(leaves, **options)
    (out.square().sum() + lse.sum()).backward()
    return out, lse, *(leaf.grad for leaf in leaves.values())


@pytest.mark.parametrize("implementation", ["blocked", pytest.param("native", marks=needs_compiler)])
def test_compile_as_one_graph_forward_and_backward(implementation):
    def attend(tensors, window):
        doubled = {name: 2 * tensor for name, tensor in tensors.items()}
        out, lse = lambda_attention(**doubled, window=window, implementation=implementation)
        return out + 1, lse

    module = IMPLEMENTATIONS[implementation]
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for queries in (300, 317):
        call = long_call(queries, 100)
        tensors = {name: call[name] for name in ("query", "key", "value", "query_far", "key_far", "value_far")}
        expected = differentiated(attend, tensors, window=100)
        with patch.object(module, "run", wraps=module.run) as ran:
            actual = differentiated(compiled, tensors, window=100)
        assert ran.call_count == 1
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["blocked", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("queries", [1, 60])
def test_second_derivatives_are_exact_too(implementation, queries):
    """A penalty on gradients is part of a loss like any other."""
    call = long_call(60, 20)
    tensors = {name: call[name][:, :, -queries:] if "query" in name else call[name] for name in TENSORS.split()[:6]}
    found = []
    for name, dtype in ((implementation, torch.float32), ("reference", torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors.values()]
        arguments = dict(zip(tensors, leaves, strict=True))
        out, lse = lambda_attention(**arguments, window=20, implementation=name)
        first = torch.autograd.grad(out.sum() + lse.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("implementation", ["blocked", pytest.param("native", marks=needs_compiler)])
def test_forward_mode_derivatives_are_refused(implementation):
    query = torch.randn(1, 2, 30, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            lambda_attention(dual, query, query, window=9, implementation=implementation)


@pytest.mark.parametrize("compile", [False, True])
def test_autocast_means_its_dtype_and_reaches_no_further(compile):
    torch.compiler.reset()
    attend = torch.compile(lambda_attention, fullgraph=True, backend="aot_eager") if compile else lambda_attention
    call = long_call(60, 20)
    tensors = {name: call[name] for name in TENSORS.split()[:6]}

    def results(function, halved, autocast):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        given = {name: leaf.bfloat16() if halved else leaf for name, leaf in leaves.items()}
        given["value"] = given["value"].bfloat16()  # as a linear layer under autocast gives it beside rotated queries
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, lse = function(**(call | given), implementation="blocked")
            out.float().square().sum().backward()
        return out, lse, *(leaf.grad for leaf in leaves.values())

    expected, actual = results(lambda_attention, True, False), results(attend, False, True)
    assert actual[0].dtype == torch.bfloat16
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_compiled_step_serves_every_place_of_the_ring():
    query, key, value = torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 2, 40, 16)
    attend = partial(lambda_attention, query, key, value, window=30)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda start: attend(ring_start=start), fullgraph=True, backend=backend)
    for start in (0, 7, 39):
        actual = step(torch.tensor(start))
        assert len(graphs) == 1
        torch.testing.assert_close(actual, attend(ring_start=start, implementation="reference"), atol=1e-5, rtol=1e-5)


def test_the_operator_keeps_what_it_says_about_itself():
    call = long_call(40, 20)
    tensors = [call[name].requires_grad_() for name in TENSORS.split()[:6]]
    extra = (call["far_positions"], None, None, call["first_valid"], None, None)
    options = (20, 0, 0.25, None, "blocked")
    torch.library.opcheck(torch.ops.longpatch.lambda_attention.default, (*tensors, *extra, *options))


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
