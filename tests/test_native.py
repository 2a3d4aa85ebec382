"""The C++ kernel: equal to the definition, shared by threads, compiled once, and what happens without a compiler."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longpatch_kernels import blocked, explain, lambda_attention, native, not_supported_reasons
from longpatch_kernels.native import build as compilation
from tests.cases import cases
from tests.equality import LONG, STEP, check_float32, check_half, long_call, needs_compiler

pytestmark = pytest.mark.usefixtures("poisoned")

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
