"""Every implementation of `lambda_attention` against the dense definition in float64: outputs and gradients."""

from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from longpatch_kernels import IMPLEMENTATIONS, blocked, explain, lambda_attention, native, not_supported_reasons
from longpatch_kernels.blocked import bands
from longpatch_kernels.compiled import TENSORS
from longpatch_kernels.native import build as compilation
from tests.cases import build, cases, error, run

FAST = ["blocked"]  # the others have tests of their own
needs_compiler = pytest.mark.skipif(isinstance(compilation.library(), str), reason=f"{compilation.library()}")

# what runs in bands and in decode steps, up to sizes where the kernel's tiles, blocks and tails all occur
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


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that what is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check_float32(implementation, case):
    compare(build(case, torch.float32), implementation, case["through_lse"])


def compare(arguments, implementation, through_lse):
    expected = run(arguments, "reference", torch.float64, through_lse)
    actual = run(arguments, implementation, through_lse=through_lse)
    for name, reference in expected.items():
        largest = reference[reference > -torch.inf].abs().max().item() if (reference > -torch.inf).any() else 0.0
        assert error(actual[name], reference) < 2e-5 * max(1.0, largest), name


@pytest.mark.parametrize("implementation", FAST)
@given(case=cases())
def test_float32_equals_the_definition(implementation, case):
    check_float32(implementation, case)


@pytest.mark.parametrize(("name", "drawn", "examples"), [("banded", LONG, 12), ("decode", STEP, 25)])
def test_each_cpu_algorithm_equals_the_definition(name, drawn, examples):
    @settings(max_examples=examples)
    @given(case=drawn)
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


@pytest.mark.parametrize(("group", "dtype"), [(1, "float32"), (3, "float32"), (1, "bfloat16")])
def test_tall_blocks_and_their_folded_keys_equal_the_definition(group, dtype):
    settled = {"batch": 2, "key_heads": 1, "group": group, "head_dim": 16, "queries": 1400, "cached": 30, "window": 500}
    settled |= {"sinks": 4, "extra_distance": 0, "ring": int, "padding": False, "far_mask": True, "softcap": None}
    case = settled | {"alibi": False, "through_lse": False, "seed": 5}
    with (
        patch.object(bands, "FOLDED_WINDOW", 500),
        patch.object(bands, "TALL_ROWS", 384),
        patch.object(bands, "_two_bands", wraps=bands._two_bands) as folded,
    ):
        if dtype == "float32":
            check_float32("blocked", case)
        else:
            check_half("blocked", case, torch.bfloat16)
    assert folded.call_count > 2  # forward and backward


NATIVE = {"softcap": st.none(), "alibi": st.just(False), "far_mask": st.just(False)}
NATIVE_CASES = cases(head_dim=st.sampled_from([16, 64, 80]), sinks=st.sampled_from([0, 1, 10, 200]), **NATIVE)


@needs_compiler
@given(case=NATIVE_CASES | LONG.map(lambda case: case | {"far_mask": False}))
@settings(max_examples=30)
def test_the_native_kernel_equals_the_definition(case):
    with (
        patch.object(native, "forward", wraps=native.forward) as forward,
        patch.object(blocked, "gradients") as elsewhere,
    ):
        check_float32("native", case)
    assert forward.call_count == 1
    assert not elsewhere.called


@needs_compiler
@given(case=STEP.map(lambda case: case | {"far_mask": False}), threads=st.sampled_from([1, 2]))
@settings(max_examples=12)
def test_native_decode_steps_equal_the_definition(case, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_float32("native", case)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("threads", [2, 5])
def test_native_prefill_is_shared_by_threads(threads):
    call = long_call(700, 200)
    alone = lambda_attention(**call, implementation="native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = lambda_attention(**call, implementation="native")
    finally:
        torch.set_num_threads(before)
    wanted = lambda_attention(**call, implementation="reference")
    for mine, same, theirs in zip(together, alone, wanted, strict=True):
        torch.testing.assert_close(mine, same, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@needs_compiler
@given(case=NATIVE_CASES)
@settings(max_examples=20)
def test_native_bfloat16_is_as_good_as_the_dense_version(case):
    check_half("native", case, torch.bfloat16)


@needs_compiler
def test_native_reads_no_key_before_the_first_valid_one():
    call = long_call(400, 100) | {"first_valid": torch.tensor([0, 61])}
    expected = lambda_attention(**call, implementation="reference")
    for name in ("key", "value"):
        call[name][1, :, :61] = torch.nan
    for actual, wanted in zip(lambda_attention(**call, implementation="native"), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("queries", [1, 60])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows_where_it_is_seen(queries, value):
    """A diverged model must not look healthy."""
    for name, place in (("query", -1), ("key", -2), ("query_far", -1), ("key_far", 1), ("key", slice(None))):
        call = long_call(60, 20) | {"first_valid": torch.tensor([0, 0])}
        call |= {part: call[part][:, :, -queries:] for part in ("query", "query_far")}
        call[name][0, 0, place] = value
        expected = lambda_attention(**call, implementation="reference")
        actual = lambda_attention(**call, implementation="native")
        assert expected[0].isnan().any()
        for mine, wanted in zip(actual, expected, strict=True):  # a log-sum-exp may be inf in one, NaN in the other
            assert torch.equal(mine.isfinite(), wanted.isfinite()), name


@pytest.mark.parametrize("implementation", FAST)
@given(case=cases())
def test_bfloat16_is_as_good_as_the_dense_version(implementation, case):
    check_half(implementation, case, torch.bfloat16)


@settings(max_examples=15)
@given(case=cases() | LONG | STEP)
def test_float16_is_as_good_as_the_dense_version(case):
    check_half("blocked", case, torch.float16)


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
        modules = native, blocked.decode, blocked.banded, blocked.general
        ran = [stack.enter_context(patch.object(m, "forward", wraps=m.forward)) for m in modules]
        out, lse = lambda_attention(**arguments, implementation=implementation)
    assert [call.args[0].query.dtype for function in ran for call in function.call_args_list] == [dtype]
    compare_with({"out": out}, ["out"])
    assert error(lse, expected["lse"]) < 2e-2


@pytest.mark.parametrize("queries", [1, 50, 1100])
@pytest.mark.parametrize("group", [1, 3])
def test_a_wide_window_is_causal_attention(queries, group):
    query = torch.randn(2, 2 * group, queries, 16)
    key, value = torch.randn(2, 2, 2, queries, 16).unbind()
    out, _ = lambda_attention(query, key, value, window=queries, implementation="blocked")
    causal = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, causal, atol=1e-5, rtol=1e-5)


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
    assert chosen(1, 1) == chosen(17, 500) == chosen(2, 500, group=9) == "auto runs blocked: banded"
    assert chosen(17, 500, dtype=torch.bfloat16) == "auto runs blocked: banded"
    assert chosen(500, 500, dtype=torch.float64) == chosen(1, 500, softcap=3.0) == "auto runs blocked: general"
    for key_count, window, preferred in (
        (2048, 64, "native"),
        (2048, 2048, "blocked: banded"),
        (12, 8, "blocked: banded"),
    ):
        tensor = torch.zeros(1, 2, key_count, 16)
        first = explain(tensor, tensor, tensor, window=window).splitlines()[0]
        assert first == f"auto runs {preferred}" or isinstance(compilation.library(), str)
    assert [bands.block_queries(window, 1) for window in (16, 256, 1024)] == [64, 64, 192]
    assert bands.block_queries(1024, 3) == 64


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


def native_reasons():
    return not_supported_reasons("native", *[torch.zeros(1, 1, 64, 16)] * 3, window=8)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "folder", lambda: tmp_path)
    yield monkeypatch, tmp_path
    compilation.library.cache_clear()


def test_without_a_compiler_it_says_so(fresh_build):
    monkeypatch, _ = fresh_build
    monkeypatch.setattr("shutil.which", lambda name: None)
    compilation.library.cache_clear()
    assert "no C++ compiler found; looked for c++" in native_reasons()[0]
    with pytest.raises(ValueError, match="implementation 'native' cannot run: no C\\+\\+ compiler"):
        lambda_attention(*[torch.zeros(1, 1, 4, 16)] * 3, window=2, implementation="native")
    tensor = torch.zeros(1, 2, 2048, 16)
    assert explain(tensor, tensor, tensor, window=64).startswith("auto runs blocked")


@needs_compiler
def test_what_does_not_compile_is_reported_and_leaves_nothing(fresh_build):
    monkeypatch, folder = fresh_build
    broken = folder / "broken.cpp"
    broken.write_text("int f( {")
    monkeypatch.setattr(compilation, "SOURCE", broken)
    compilation.library.cache_clear()
    assert "failed: " in native_reasons()[0]
    assert list(folder.iterdir()) == [broken]


@needs_compiler
def test_the_next_compiler_is_tried(fresh_build):
    monkeypatch, folder = fresh_build
    killed, silent = folder / "killed", folder / "silent"
    for path, script in ((killed, "kill -9 $$"), (silent, "exit 3")):
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setattr(compilation, "COMPILERS", (str(killed), str(silent)))
    compilation.library.cache_clear()
    (reason,) = native_reasons()
    assert f"{killed} failed: Command" in reason
    assert f"{silent} failed: Command" in reason
    monkeypatch.setattr(compilation, "COMPILERS", (str(killed), "c++", "g++"))
    compilation.library.cache_clear()
    assert not native_reasons()


@needs_compiler
def test_it_is_compiled_once(fresh_build):
    _, folder = fresh_build
    compilation.library.cache_clear()
    assert not native_reasons()
    (made,) = folder.iterdir()
    stamp = made.stat().st_mtime_ns
    compilation.library.cache_clear()
    assert not native_reasons()
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [stamp]


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
