"""Every way people generate: as the unconverted model does inside the window, as the dense definition says outside it.

Outside, the reference is a forward over the whole text without any cache, which `test_definition.py` and the family
tests compare with the dense definition in float64.
"""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, TextStreamer, pipeline
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.streamers import BaseStreamer

from longpatch import LambdaCache, LongpatchError, convert_llama_model
from longpatch.decode import _hidden_run
from tests.tiny import random_ids, tiny_llama

WINDOW, SINKS, NEW = 12, 3, 24


def converted(window=WINDOW, slack=8, **settings):
    return convert_llama_model(tiny_llama(**settings), window, SINKS, slack=slack)


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


class Never(LogitsProcessor):
    """Forbids even tokens."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams_sampled": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "several_beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 4},
    "processors": {"do_sample": False, "logits_processor": LogitsProcessorList([Never()]), "repetition_penalty": 1.3},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


def generate(model, ids, way, **more):
    torch.manual_seed(7)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True} | WAYS[way] | more
    return model.generate(ids, **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_inside_the_window_as_the_unconverted_model(way, padded):
    ids = random_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, : 4 * padded] = 0
    expected = generate(tiny_llama(), ids, way, attention_mask=mask)
    actual = generate(converted(window=64), ids, way, attention_mask=mask)
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_outside_the_window_as_without_a_cache(way, padded):
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, : 6 * padded] = 0
    model, uncached = converted(), WAYS[way] | {"use_cache": False}
    for option in ("prefill_chunk_size", "cache_implementation"):
        uncached.pop(option, None)
    torch.manual_seed(7)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **uncached)
    actual = generate(model, ids, way, attention_mask=mask)
    assert torch.equal(actual.sequences, expected)
    assert isinstance(actual.past_key_values, LambdaCache)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_every_step_is_the_definition(padded, monkeypatch):
    """Decoding token by token, next to the dense definition in float64 over the whole text."""
    ids = random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[1, : 5 * padded] = 0
    dense = convert_llama_model(tiny_llama(dtype=torch.float64), WINDOW, SINKS, implementation="reference")
    expected = dense(ids, attention_mask=mask, use_cache=False).logits.float()
    model = converted()
    for static in (False, True):
        cache = LambdaCache(model.config, static=static)
        model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        for at in range(8, 70):
            logits = model(ids[:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], expected[:, at], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("slack", [0, 8])
@torch.no_grad()
def test_the_short_way_is_the_long_way(slack):
    """A decode step with gradients allowed goes the long way; values are the same."""
    model, ids = converted(slack=slack), random_ids(2, 50)
    short, long = LambdaCache(model.config), LambdaCache(model.config)
    for at in range(50):
        one = model(ids[:, at : at + 1], past_key_values=short).logits
        with torch.enable_grad():
            other = model(ids[:, at : at + 1], past_key_values=long).logits
        torch.testing.assert_close(one, other.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [12, 64])
def test_assisted_decoding(window):
    """A draft model that is mostly wrong, so that crops happen; both with and without its own conversion."""
    model, ids = converted(window), random_ids(1, 10)
    expected = generate(model, ids, "greedy").sequences
    for assistant in (tiny_llama(seed=1), convert_llama_model(tiny_llama(seed=0), window, SINKS, slack=8)):
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assert torch.equal(generate(model, ids, "greedy", assistant_model=assistant).sequences, expected)


@pytest.mark.parametrize("window", [12, 64])
def test_prompt_lookup_decoding(window):
    model = converted(window)
    ids = random_ids(1, 6).repeat(1, 3)
    expected = generate(model, ids, "greedy").sequences
    assert torch.equal(generate(model, ids, "greedy", prompt_lookup_num_tokens=4).sequences, expected)


def test_drafts_longer_than_the_slack_are_refused_before_anything_is_generated():
    model, ids, assistant = converted(), random_ids(1, 10), tiny_llama(seed=1)
    read = []
    model.register_forward_pre_hook(lambda *_: read.append(1))
    assistant.generation_config.num_assistant_tokens = 9
    with pytest.raises(LongpatchError, match=r"drafts of 9 tokens.*slack=8"):
        model.generate(ids, assistant_model=assistant, max_new_tokens=4)
    with pytest.raises(LongpatchError, match=r"drafts of 20 tokens.*slack=8"):
        model.generate(ids, prompt_lookup_num_tokens=20, max_new_tokens=4)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    with pytest.raises(LongpatchError, match=r"num_assistant_tokens_schedule='heuristic'"):
        model.generate(ids, assistant_model=assistant, max_new_tokens=4)
    assert not read


def test_a_loop_of_ones_own_with_two_continuations():
    """Contrastive decoding and the like: a copy of the cache per candidate, `batch_select_indices` for the winner."""
    model, ids = converted(), random_ids(1, 30)
    candidates = torch.tensor([[5], [9]])
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_repeat_interleave(2)
        both = model(candidates, past_key_values=cache).logits[:, -1]
        cache.batch_select_indices(torch.tensor([1]))
        rest = model(torch.tensor([[3]]), past_key_values=cache).logits[0, -1]
        for row in range(2):
            text = torch.cat((ids, candidates[row : row + 1]), dim=1)
            torch.testing.assert_close(both[row], model(text, use_cache=False).logits[0, -1], atol=1e-4, rtol=1e-4)
        text = torch.cat((ids, torch.tensor([[9, 3]])), dim=1)
        torch.testing.assert_close(rest, model(text, use_cache=False).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_function_of_ones_own_as_custom_generate():
    def argmax_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache, token = kwargs["past_key_values"], input_ids
        for _ in range(generation_config.max_new_tokens):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            input_ids = torch.cat((input_ids, token), dim=1)
        return input_ids

    model, ids = converted(), random_ids(2, 15)
    expected = generate(model, ids, "greedy").sequences
    actual = model.generate(ids, custom_generate=argmax_loop, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(actual, expected)


def test_streamers_get_every_token():
    model, ids, streamer = converted(), random_ids(1, 20), Recorder()
    output = generate(model, ids, "greedy", streamer=streamer)
    assert streamer.ids == output.sequences[0].tolist()
    assert streamer.ended


def test_embeddings_as_input():
    model, ids = converted(), random_ids(2, 30)
    expected = generate(model, ids, "greedy").sequences[:, 30:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, None, "greedy", inputs_embeds=embeddings).sequences, expected)


def test_three_turns_with_a_kept_cache():
    """Static and growing caches, a left-padded batch: as one generation over all that was said."""
    model = converted()
    turns = [random_ids(2, 14), random_ids(2, 9, 1), random_ids(2, 3, 2)]
    first_mask = torch.ones_like(turns[0])
    first_mask[0, :5] = 0
    for static in (False, True):
        cache, text = LambdaCache(model.config, static=static), turns[0][:, :0]
        for new in turns:
            text = torch.cat((text, new), dim=1)
            mask = torch.cat((first_mask, torch.ones(2, text.shape[1] - 14, dtype=torch.long)), dim=1)
            expected = model.generate(text, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=False)
            text = model.generate(text, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache)
            assert torch.equal(text, expected)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0} | {f"w{index}": index for index in range(1, 97)}
    core = Tokenizer(models.WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>")
    tokenizer.padding_side = "left"
    return tokenizer


def test_pipeline(tokenizer, capsys):
    model = converted()
    texts = ["w5 w9 w22 w3 " * 5, "w7 w8"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    outputs = pipe(texts, max_new_tokens=NEW, do_sample=False, batch_size=2, return_tensors=True)
    for text, output in zip(texts, outputs, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=False)[0].tolist()
        assert output[0]["generated_token_ids"][-NEW:] == expected[-NEW:]
    pipe(texts[1], max_new_tokens=3, do_sample=False, streamer=TextStreamer(tokenizer))
    assert "w7 w8" in capsys.readouterr().out


@torch.no_grad()
def test_compiled_decoding_is_one_graph():
    """`torch.compile` of the whole model: from inside the window to far outside, one graph, compiled once."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, ids = converted(), random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache = LambdaCache(model.config, static=True)
    model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for at in range(6, 60):
            logits = step(ids[:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], expected[:, at], atol=2e-3, rtol=1e-3)
    assert len(graphs) == 1
    assert cache.get_seq_length() == 60
    cache.crop(-5)
    torch.testing.assert_close(
        model(ids[:, 55:56], past_key_values=cache).logits[:, 0], expected[:, 55], atol=2e-3, rtol=1e-3
    )


@torch.no_grad()
def test_generate_compiles_by_itself_with_a_static_cache():
    """What `generate` does on a GPU, done here on the CPU: its own compiled call, one graph for all tokens."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, ids = converted(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    settings = CompileConfig(fullgraph=True, backend=backend, mode=None)
    settings._compile_all_devices = True
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = model.generate(ids, cache_implementation="static", compile_config=settings, **options)
    assert torch.equal(actual, expected)
    assert len(graphs) == 1


def test_a_mask_kept_in_inference_mode_serves_a_step_with_gradients():
    _hidden_run.cache_clear()
    with torch.inference_mode():
        kept = _hidden_run(8, 23, torch.float32, torch.device("cpu"))
    assert not kept.is_inference()
    query = torch.ones(1, 2, 1, 64, requires_grad=True)
    key = torch.ones(1, 2, kept.shape[3], 64)
    torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=kept).sum().backward()
