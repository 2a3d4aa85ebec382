import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small and tests run side by side; children inherit it

import pytest
import torch
from hypothesis import settings

settings.register_profile("longpatch", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("longpatch")


def import_interpreted_kernels():
    """Without a GPU the Triton kernels run in Triton's interpreter.

    Triton decides this per function where it is decorated, for its own helpers when it is first imported: so it is
    imported here, before anything else (a compiler, say) imports it. The switch is off again afterwards, and
    test_triton.py turns it on for its own tests alone.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from longpatch_kernels.triton import backward, decode, forward  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    import_interpreted_kernels()


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Run `longpatch eval ...` in a folder that holds story.txt; the records it wrote."""
    from longpatch.cli import main
    from longpatch.results import read_records
    from tests.evaluating import STORY

    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text(STORY * 12, encoding="utf-8")

    def run(name, *arguments, out="out.jsonl"):
        assert main(["eval", name, *map(str, arguments), "--out", out]) == 0
        return read_records(tmp_path / out)

    return run


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that what is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
