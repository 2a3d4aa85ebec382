"""The Triton kernels against the dense definition in float64: compiled where there is a GPU, else interpreted."""

import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.cases import build, cases, compare, run

pytest.importorskip("triton", reason="Triton is not installed")

from longpatch_kernels import lambda_attention, not_supported_reasons
from longpatch_kernels.inputs import LambdaInputs
from longpatch_kernels.triton import backward, decode, forward, tuning

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

PHASES = (Phase.explicit, Phase.generate)  # shrinking a failure would take the interpreter many minutes

# Tiles are 16 x 16 in the interpreter: a hundred tokens meet full, left, diagonal and ragged tiles.
CASES = cases(
    batch=st.sampled_from([1, 1, 2]),
    key_heads=st.sampled_from([1, 1, 2]),
    group=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([16, 20, 48]),
    queries=st.integers(1, 5) | st.integers(1, 60),
    cached=st.sampled_from([0, 0, 1, 7, 40]),
    window=st.integers(1, 9) | st.integers(1, 80),
    sinks=st.sampled_from([0, 1, 20]),
)


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """`torch.empty` comes filled with NaN, so that whatever a kernel fails to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def counting(function, counted):
    def call(*arguments):
        counted[function.__name__] = counted.get(function.__name__, 0) + 1
        return function(*arguments)

    return call


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel's host function ran."""
    counted = {}
    for module, name in ((forward, "forward"), (decode, "decode"), (backward, "backward")):
        monkeypatch.setattr(module, name, counting(getattr(module, name), counted))
    return counted


def on_device(arguments):
    return {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


def check(case, dtype, tolerance):
    compare(on_device(build(case, dtype)), "triton", tolerance=tolerance)


@settings(max_examples=16, phases=PHASES)
@given(case=CASES)
def test_float32_equals_the_definition(case):
    check(case, torch.float32, 2e-5)


@settings(max_examples=8, phases=PHASES)
@given(case=CASES)
def test_prefill_equals_the_definition_for_few_queries_too(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "DECODE_ROWS", 0)
        check(case, torch.float32, 2e-5)


@settings(max_examples=6, phases=PHASES)
@given(case=CASES)
def test_float16_is_as_good_as_its_rounding(case):
    check(case, torch.float16, 8e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device; the interpreter computes bfloat16 products wrongly")
@given(case=CASES)
def test_bfloat16_is_as_good_as_its_rounding(case):
    check(case, torch.bfloat16, 6e-2)


BASE = {
    "batch": 2, "key_heads": 1, "group": 2, "head_dim": 16, "queries": 40, "cached": 10, "window": 20, "sinks": 3,
    "extra_distance": 0, "ring": None, "padding": True, "far_mask": True, "softcap": None, "alibi": False, "seed": 1,
}  # fmt: skip


def test_which_kernels_run(calls):
    run(on_device(build(BASE | {"batch": 1, "queries": 70}, torch.float32)), "triton")
    assert calls == {"forward": 1, "backward": 1}
    run(on_device(build(BASE | {"queries": 1, "ring": int}, torch.float32)), "triton")
    assert calls == {"forward": 1, "decode": 1, "backward": 2}


@pytest.mark.parametrize(("queries", "head_dim"), [(33, 20), (1, 16)])
def test_compile_as_one_graph_forward_and_backward(calls, queries, head_dim):
    arguments = on_device(
        build(BASE | {"batch": 1, "queries": queries, "head_dim": head_dim, "ring": torch.tensor}, torch.float32)
    )
    torch.compiler.reset()
    compiled = torch.compile(lambda_attention, fullgraph=True, backend="aot_eager")
    expected = run(arguments, "triton")
    ran = dict(calls)
    actual = run(arguments, "triton", attention=compiled)
    assert calls == {name: 2 * count for name, count in ran.items()}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ring", [int, torch.tensor])
def test_decode_reads_the_ring_where_it_lies(monkeypatch, ring):
    def refuse(self):
        raise AssertionError("the ring was unrolled")

    arguments = on_device(build(BASE | {"queries": 2, "ring": ring, "cached": 31}, torch.float32))
    expected = lambda_attention(**arguments, implementation="reference")
    monkeypatch.setattr(LambdaInputs, "in_time_order", refuse)
    with torch.no_grad():
        actual = lambda_attention(**arguments, implementation="triton")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_tokens_before_heads_in_memory():
    """Views as models make them, [B, n, H, d] transposed, are read where they lie and give what dense tensors give."""
    arguments = on_device(build(BASE | {"key_heads": 2, "batch": 1, "group": 1}, torch.float32))
    dense = run(arguments, "triton")
    names = ("query", "key", "value", "query_far", "key_far", "value_far")
    views = {name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in names}
    assert not views["key"].is_contiguous()
    viewed = run(arguments | views, "triton")
    for name, value in dense.items():
        assert torch.equal(viewed[name], value), name


def test_backward_gives_the_same_bits_twice():
    arguments = on_device(build(BASE | {"batch": 1}, torch.float32))
    first, second = run(arguments, "triton"), run(arguments, "triton")
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_rows_that_see_nothing_have_no_gradient():
    """Everything padded: out 0, lse -inf, no NaN in any gradient."""
    arguments = on_device(build(BASE | {"sinks": 0}, torch.float32))
    arguments["first_valid"] = torch.full((2,), 1000, device=DEVICE)
    results = run(arguments, "triton")
    assert results["lse"].isneginf().all()
    assert all((results[name] == 0).all() for name in ("out", "query", "key", "value"))


def test_every_reason_is_listed():
    far_too_wide = torch.zeros(1, 1, 2, 512, dtype=torch.float64)
    with pytest.raises(ValueError, match="implementation 'triton' cannot run") as caught:
        lambda_attention(far_too_wide, far_too_wide, far_too_wide, window=2, scale=-1.0, implementation="triton")
    for part in ("float64", "head size 512 is above 256", "scale -1.0 is not positive"):
        assert part in str(caught.value)


@pytest.mark.skipif(GPU, reason="about machines without a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    tensor = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ValueError, match="the tensors are on cpu; Triton kernels need a CUDA device"):
        lambda_attention(tensor, tensor, tensor, window=2, implementation="triton")


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reasons = not_supported_reasons("triton", *[torch.zeros(1, 1, 2, 16)] * 3, window=2)
    assert "Triton is not installed" in reasons[0]


@pytest.mark.parametrize(("rows", "keys"), [(1, 4106), (256, 4106), (1, 5), (8, 1_000_000)])
def test_a_split_covers_every_key_once(rows, keys):
    splits, chunk = tuning.split(rows, keys, tuning.INTERPRETED, torch.device("cpu"))
    assert (splits - 1) * chunk < keys <= splits * chunk
    assert chunk % tuning.INTERPRETED.block_n == 0
