"""Every token is scored once, and however the text is cut, by the same rule."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from longpatch import convert_llama_model
from longpatch.demo import load
from longpatch.evaluation.passkey import passkey_prompt
from longpatch.evaluation.perplexity import bits_per_byte, perplexity, stream_nll, window_nll
from tests.tiny import random_ids, tiny_llama

BOS = 0


@torch.no_grad()
def dense(model, ids):
    return cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_streamed_text_is_scored_as_in_one_forward(converted, chunk):
    model, ids = tiny_llama(), random_ids(1, 65)[0]
    if converted:
        convert_llama_model(model, 16, 4)
    chunks = list(stream_nll(model, ids, chunk))
    torch.testing.assert_close(torch.cat([c.nll for c in chunks]), dense(model, ids), atol=3e-4, rtol=1e-4)
    assert [c.start for c in chunks] == list(range(0, 64, chunk))


@pytest.mark.parametrize("bos", [BOS, None])
def test_fresh_windows_know_nothing_of_each_other(bos):
    model, ids, window = tiny_llama(), random_ids(1, 50)[0], 16
    actual = torch.cat(list(window_nll(model, ids, window, bos, batch=2)))
    stride = window if bos is None else window - 1
    pieces = ids.split(stride)
    if bos is not None:
        pieces = [torch.cat((torch.tensor([bos]), piece)) for piece in pieces]
        assert len(actual) == len(ids)
    expected = torch.cat([dense(model, piece) for piece in pieces])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_units():
    nll = torch.full((8,), torch.log(torch.tensor(4.0)).item())
    assert perplexity(nll) == pytest.approx(4.0)
    assert bits_per_byte(nll, text_bytes=4) == pytest.approx(4.0)  # 8 tokens of 2 bits over 4 bytes


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_passkey_prompts(depth):
    _, tokenizer = load()
    filler = torch.tensor(tokenizer.encode("All work and no play. " * 60, add_special_tokens=False))
    prompt = passkey_prompt(tokenizer, filler, 200, depth, "54321")
    assert prompt.shape == (200,)
    text = tokenizer.decode(prompt)
    assert text.count("54321") == 2
    assert text.endswith("The pass key is")
    with pytest.raises(ValueError, match="needs a filler"):
        passkey_prompt(tokenizer, filler, 20, depth, "54321")
