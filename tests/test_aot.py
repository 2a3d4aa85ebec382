"""The Triton kernels compiled for sm_80 and sm_90 without a GPU: spills and shared memory within limits.

In a process of its own: here the kernels may be interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.aot import RESULTS, SHARED_LIMIT, STACK_LIMIT, configurations, identity

ROOT = Path(__file__).parents[1]


def compiled(*arguments):
    """The rows that `python -m benchmarks.aot` prints; its exit status says whether all of them fit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "benchmarks.aot", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows, result.stderr
    return rows


def check(rows):
    for row in rows:
        assert row["stack_bytes"] <= STACK_LIMIT, row
        assert 0 < row["shared_bytes"] <= SHARED_LIMIT[row["chip"]], row
        assert row["fits"]


@pytest.mark.parametrize("chip", ["sm80", "sm90"])
def test_bfloat16_kernels_fit_the_chip(chip):
    rows = compiled("--quick", "--chip", chip, "--only", "bfloat16")
    assert {(row["kernel"], row["head_dim"]) for row in rows} == {
        (kernel, dim) for kernel in ("forward", "query", "key", "far", "decode") for dim in (64, 128)
    }
    check(rows)
    for row in rows:
        if row["kernel"] in ("forward", "query", "key"):
            assert row["hgmma" if chip == "sm90" else "hmma"] > 0, row
            assert (row["tma_loads"] > 0) == (chip == "sm90"), row


def test_every_configuration_that_can_be_chosen_was_compiled_by_both_versions_and_fits():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    check(rows)
    wanted = {
        (chip, kernel, str(dtype).removeprefix("torch."), dim, variant, *config)
        for chip in ("sm80", "sm90")
        for kernel, dtype, dim, config in configurations(chip, quick=False)
        for variant in ("plain", "all rules")
    }
    versions = {row["triton"] for row in rows}
    assert len(versions) == 2
    for version in versions:
        assert {identity(row)[1:] for row in rows if row["triton"] == version} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_fit_the_chip(chip, dtype):
    check(compiled("--quick", "--chip", chip, "--only", dtype))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm80", "sm86", "sm90"])
def test_every_bfloat16_configuration_fits_the_chip(chip):
    check(compiled("--chip", chip, "--only", "bfloat16"))
