"""A run that is killed, not stopped: nothing is cleaned up, and what is on disk has to do."""

import os
import random
import signal
import time

import pytest
import torch
from transformers import StoppingCriteria

from longpatch import TempLoraGenerator
from longpatch.temp_lora import checkpoint
from tests.test_temp_lora_generator import LEARN, model_with_end
from tests.tiny import random_ids

SETTINGS = LEARN | {"chunk_tokens": 6, "context_tokens": 16, "dropout": 0.1}
SAMPLING = {"do_sample": True, "top_k": 5, "max_new_tokens": 60}


@pytest.fixture(autouse=True)
def one_thread():
    """A forked child must not need the threads of its parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generate(folder=None, **more):
    torch.manual_seed(3)
    generator = TempLoraGenerator(model_with_end(converted=True), checkpoint_dir=folder, **SETTINGS)
    return generator.generate(random_ids(2, 9), **SAMPLING, **more)


def in_a_child(function, prepare=None):
    """Run `function` in a child; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        if prepare is not None:
            prepare()
        function()
    finally:
        os._exit(0)


def resume(folder):
    return TempLoraGenerator.resume(folder, model_with_end(converted=True))


def kill_itself_at(call, number):
    """Have the child kill itself at the `number`-th call of a function of `os`, before it does anything."""

    def prepare():
        original, calls = getattr(os, call), []

        def dying(*args):
            calls.append(args)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(os, call, dying)

    return prepare


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_a_checkpoint_is_written(call, tmp_path):
    expected = generate()
    child = in_a_child(lambda: generate(tmp_path), kill_itself_at(call, 4))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the checkpoint before, and the unfinished one
    assert torch.equal(resume(tmp_path), expected)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]


class Deadly(StoppingCriteria):
    """Kills the process in the middle of a chunk."""

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == 9 + 4 * 6 + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Harmless(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_within_a_chunk(tmp_path):
    expected = generate()
    child = in_a_child(lambda: generate(tmp_path, stopping_criteria=[Deadly()]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = TempLoraGenerator.resume(tmp_path, model_with_end(converted=True), stopping_criteria=[Harmless()])
    assert torch.equal(again, expected)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_random_moments(tmp_path):
    began = time.perf_counter()
    expected = generate()
    needed, rng, resumed = time.perf_counter() - began, random.Random(0), 0
    for number in range(20):
        folder = tmp_path / str(number)
        child = in_a_child(lambda folder=folder: generate(folder))
        while not (folder / checkpoint.FILE).exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, needed))
        os.kill(child, signal.SIGKILL)
        resumed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert torch.equal(resume(folder), expected), number
    assert resumed > 10
