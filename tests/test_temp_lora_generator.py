"""Generation: what plain generate would do, rows, streamers, the end of the run, checkpoints."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from longpatch import LongpatchError, TempLoraGenerator, convert_model, temp_lora
from longpatch.temp_lora import Learner
from longpatch.temp_lora.visible import sinks_of, visible
from tests.test_temp_lora import assert_same, snapshot
from tests.tiny import random_ids, tiny_llama

LEARN = {"rank": 4, "alpha": 8, "dropout": 0.0, "learning_rate": 1e-2, "progress": False}
GREEDY = {"do_sample": False, "max_new_tokens": 40}


def model_with_end(eos=None, converted=False):
    model = tiny_llama(max_position_embeddings=512, eos_token_id=eos)
    model.generation_config.pad_token_id = 0
    return convert_model(model, 24, 4) if converted else model


def padded(rows=3, count=12):
    ids = random_ids(rows, count)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return ids, mask


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    ("rows", "extra"),
    [(1, {}), (3, {}), (3, {"cache_reuse_chunks": 2}), (3, {"learn_prompt": True}), (1, {"trainable": "queries"})],
    ids=str,
)
def test_a_rate_of_zero_is_plain_generate(converted, rows, extra):
    ids, mask = padded(rows)
    if "learn_prompt" in extra:
        ids, mask = random_ids(rows, 12), torch.ones_like(ids)
    model = model_with_end(converted=converted)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=64, **LEARN | {"learning_rate": 0.0} | extra)
    assert torch.equal(generator.generate(input_ids=ids, attention_mask=mask, **GREEDY), expected)
    learned = (ids.shape[1] + 40 - 1) // 7 if "learn_prompt" in extra else 39 // 7
    assert len(generator.history) == learned
    for entry in generator.history:
        assert entry["perplexity_after"] == pytest.approx(entry["perplexity_before"], rel=1e-3)


def test_sampling_with_a_rate_of_zero_draws_the_same_tokens():
    model, ids = model_with_end(), random_ids(2, 9)
    sampling = {"do_sample": True, "top_k": 20, "max_new_tokens": 30}
    torch.manual_seed(3)
    expected = model.generate(ids, **sampling)
    torch.manual_seed(3)
    dropout = {"learning_rate": 0.0, "dropout": 0.1}
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=64, **LEARN | dropout)
    assert torch.equal(generator.generate(ids, **sampling), expected)


@pytest.mark.parametrize("converted", [False, True])
def test_learning_changes_what_is_written_and_a_seed_repeats_it(converted):
    model, ids = model_with_end(converted=converted), random_ids(1, 12)
    before = snapshot(model)
    generator = TempLoraGenerator(
        model, chunk_tokens=8, context_tokens=16, **LEARN | {"dropout": 0.1, "learning_rate": 1e-3}
    )
    output = generator.generate(ids, **GREEDY)
    assert not torch.equal(output, model.generate(ids, **GREEDY))
    assert torch.equal(generator.generate(ids, **GREEDY), output)
    assert [entry["stop"] for entry in generator.history] == [20, 28, 36, 44]
    assert all(entry["perplexity_after"] < entry["perplexity_before"] for entry in generator.history)
    assert_same(before, snapshot(model))


def straight_loop(model, ids, chunk, context, settings):
    """The same by one's own loop: plain generate on what is visible, then learn; one row, without padding."""
    settings = {name: value for name, value in settings.items() if name != "progress"}
    sinks, total = sinks_of(model), ids.shape[1] + GREEDY["max_new_tokens"]
    with temp_lora(model, **settings) as learner:
        while ids.shape[1] < total:
            seen = visible(ids, None, context, sinks).ids
            new = model.generate(seen, do_sample=False, max_new_tokens=min(chunk, total - ids.shape[1]))[
                :, seen.shape[1] :
            ]
            learner.learn(visible(ids, None, context, sinks).ids, new)
            ids = torch.cat((ids, new), dim=1)
    return ids


def test_what_a_cache_built_anew_sees():
    ids = torch.arange(1, 11).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    seen = visible(ids, mask, 3, 2)
    assert seen.ids.tolist() == [[1, 2, 8, 9, 10], [4, 5, 8, 9, 10]]
    assert seen.mask is None
    assert seen.left_out.tolist() == [5, 2]
    seen = visible(ids, mask, 6, 2)
    assert seen.ids[0].tolist() == [1, 2, 5, 6, 7, 8, 9, 10]
    assert seen.ids[1, 1:].tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert seen.mask.tolist() == [[1] * 8, [0] + [1] * 7]
    assert visible(ids, None, 8, 2).ids.tolist() == ids.tolist()
    assert visible(ids, mask, 7, 3).mask.tolist() == mask.tolist()


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("prompt", [6, 50])
def test_it_is_the_straight_loop(converted, prompt):
    model, ids = model_with_end(converted=converted), random_ids(1, prompt)
    expected = straight_loop(model, ids, 8, 20, LEARN)
    assert torch.equal(
        TempLoraGenerator(model, chunk_tokens=8, context_tokens=20, **LEARN).generate(ids, **GREEDY), expected
    )


@pytest.mark.parametrize("converted", [False, True])
def test_rows_are_what_they_would_be_alone(converted):
    ids, mask = padded()
    plain = model_with_end().generate(ids[:1], max_new_tokens=30, do_sample=False)
    model = model_with_end(eos=int(plain[0, 30]), converted=converted)  # some row may end early
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **LEARN)
    together = generator.generate(ids, attention_mask=mask, **GREEDY)
    ended = 0
    for row in range(3):
        first = 2 * row
        alone = generator.generate(ids[row : row + 1, first:], **GREEDY)[0]
        own = together[row, first:]
        assert torch.equal(own[: len(alone)], alone)
        assert not own[len(alone) :].any()
        ended += len(alone) < len(own)
    assert converted or ended


def test_prompts_are_learned_as_they_would_be_alone():
    ids, model = random_ids(2, 17), model_with_end()
    settings = LEARN | {"learn_prompt": True, "learning_rate": 1e-3}
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **settings)
    together = generator.generate(ids, **GREEDY)
    assert generator.history[0]["start"] == 0
    for row in range(2):
        assert torch.equal(generator.generate(ids[row : row + 1], **GREEDY)[0], together[row])


@pytest.mark.parametrize(
    ("padding", "settings", "reason"),
    [
        (slice(0, 3), {"learn_prompt": True}, "learn_prompt with padding"),
        (slice(6, 9), {}, "attention_mask"),
        (slice(4, 6), {}, "attention_mask"),
    ],
    ids=["left", "right", "gap"],
)
def test_padding_that_would_be_misread_is_refused(padding, settings, reason):
    model, ids = model_with_end(), random_ids(2, 9)
    mask, before = torch.ones_like(ids), snapshot(model)
    mask[1, padding] = 0
    with pytest.raises(LongpatchError, match=reason):
        TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **LEARN | settings).generate(
            ids, attention_mask=mask, **GREEDY
        )
    assert_same(before, snapshot(model))
    if "learn_prompt" not in settings:
        with pytest.raises(LongpatchError, match="learn: attention_mask"), temp_lora(model, rank=4) as learner:
            learner.learn(ids[:, :4], ids[:, 4:], attention_mask=mask)


@pytest.mark.parametrize("settings", [{}, {"context_grad": False}, {"measure": False}], ids=str)
@pytest.mark.parametrize("converted", [False, True])
def test_it_learns_in_inference_mode_too(settings, converted):
    ids, mask = padded()
    settings = {"chunk_tokens": 7, "context_tokens": 20} | LEARN | settings
    outside = TempLoraGenerator(model_with_end(converted=converted), **settings)
    expected = outside.generate(ids, attention_mask=mask, **GREEDY)
    inside = TempLoraGenerator(model_with_end(converted=converted), **settings)
    with torch.inference_mode():
        output = inside.generate(ids.clone(), attention_mask=mask.clone(), **GREEDY)
    assert torch.equal(output, expected)
    assert [e["loss"] for e in inside.history] == [e["loss"] for e in outside.history]


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [(9, {"trainable": "queries"}), (54, {"learn_prompt": True, "chunk_tokens": 60}), (54, {})],
    ids=str,
)
def test_a_cache_that_grows_is_built_anew(prompt, settings):
    """Of a model that is not converted: it holds the inference context and what was written since."""
    settings = {"chunk_tokens": 8, "context_tokens": 20} | LEARN | settings
    generator = TempLoraGenerator(model_with_end(), **settings)
    output = generator.generate(random_ids(1, prompt), return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 5})
    assert output.past_key_values.get_seq_length() < 20 + 5
    if prompt < 20:
        output = generator.generate(random_ids(1, prompt), return_dict_in_generate=True, **GREEDY)
        assert output.past_key_values.get_seq_length() < 20 + 8


def test_perplexities_are_measured_without_dropout():
    settings = LEARN | {"dropout": 0.5, "learning_rate": 0.0}
    generator = TempLoraGenerator(model_with_end(), chunk_tokens=8, context_tokens=20, **settings)
    generator.generate(random_ids(1, 9), **GREEDY)
    with temp_lora(model_with_end(), rank=4) as learner:  # an adapter that changes something, for dropout to show
        learner.start(1).weights[0].normal_(std=0.1)
        ids = random_ids(1, 30)
        assert not torch.equal(learner.learn(ids[:, :9], ids[:, 9:]).nll, learner.score(ids[:, :9], ids[:, 9:]))
    original = Learner.start

    def start(self, rows):
        fresh = self.adapter is None
        adapter = original(self, rows)
        if fresh:
            adapter.weights[0].normal_(std=0.1)
        return adapter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "start", start)
        generator.generate(random_ids(1, 9), **GREEDY)
    for entry in generator.history:
        assert entry["perplexity_before"] == pytest.approx(entry["perplexity_after"], rel=1e-4)


def test_a_generation_config_is_taken_without_being_told_off(monkeypatch):
    model, ids = model_with_end(), random_ids(1, 9)
    warned = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning_once", lambda text, *_: warned.append(text))
    config = GenerationConfig(max_new_tokens=20, do_sample=False)
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **LEARN)
    assert generator.generate(ids, config).shape == (1, 29)
    assert config.use_cache is None
    assert not warned


def test_what_comes_after_a_rows_end_is_not_learned(monkeypatch):
    ids = random_ids(2, 9)
    plain = model_with_end().generate(ids, max_new_tokens=30, do_sample=False)
    eos = int(plain[0, 20])
    masks, original = [], Learner.learn

    def learn(self, context_ids, new_ids, **options):
        masks.append(options["loss_mask"])
        return original(self, context_ids, new_ids, **options)

    monkeypatch.setattr(Learner, "learn", learn)
    settings = LEARN | {"learning_rate": 0.0}
    model = model_with_end(eos=eos)
    output = TempLoraGenerator(model, chunk_tokens=4, context_tokens=64, **settings).generate(ids, **GREEDY)
    learned = torch.cat(masks, dim=1)
    for row in range(2):
        ends = (output[row, 9:] == eos).nonzero().flatten().tolist()
        written = ends[0] + 1 if ends else learned.shape[1]
        assert learned[row].nonzero().flatten().tolist() == list(range(min(written, learned.shape[1])))
    assert not learned.all()


class Streamer:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.flatten().tolist())

    def end(self):
        self.calls.append("end")


def test_a_streamer_sees_one_prompt_and_one_end():
    model, ids, streamer = model_with_end(), random_ids(1, 9), Streamer()
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **LEARN)
    output = generator.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.calls[0] == ids[0].tolist()
    assert streamer.calls[1:-1] == [[token] for token in output[0, 9:].tolist()]
    assert streamer.calls[-1] == "end"
    assert "end" not in streamer.calls[:-1]


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_the_run_ends_as_asked_for():
    model, ids = model_with_end(), random_ids(1, 9)
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **LEARN)
    output = generator.generate(ids, **GREEDY)
    assert output.shape == (1, 49)
    stopped = generator.generate(ids, stopping_criteria=StoppingCriteriaList([StopAt(31)]), **GREEDY)
    assert torch.equal(stopped, output[:, :31])
    assert generator.generate(ids, generation_config=GenerationConfig(max_length=25)).shape == (1, 25)
    eos = int(output[0, 20])
    ended = generator.generate(ids, eos_token_id=eos, **GREEDY)
    assert ended[0, -1] == eos
    assert ended.shape[1] <= 21
    least = generator.generate(ids, eos_token_id=eos, min_new_tokens=35, **GREEDY)
    assert least.shape[1] >= 44
    assert generator.generate(ids, max_time=0.0, **GREEDY).shape == (1, 10)
    rows = generator.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=20)
    assert rows.shape == (3, 29)


def test_a_result_with_fields_has_the_history():
    model, ids = model_with_end(), random_ids(2, 9)
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **LEARN)
    output = generator.generate(ids, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert len(output.scores) == 40
    assert output.history == generator.history
    assert torch.equal(output.sequences, generator.generate(ids, **GREEDY))


REFUSED = [
    ({"num_beams": 2}, "beam"),
    ({"use_cache": False}, "use_cache"),
    ({"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds"),
    ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({"prompt_lookup_num_tokens": 3}, "assisted"),
]


@pytest.mark.parametrize(("kwargs", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_cannot_be_learned_from_is_refused(kwargs, reason):
    model = model_with_end()
    before = snapshot(model)
    with pytest.raises(LongpatchError, match=reason):
        TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **LEARN).generate(
            random_ids(1, 9), **GREEDY | kwargs
        )
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"chunk_tokens": 0}, "chunk_tokens=0"), ({"chunk": 3}, "'chunk'"), ({"rank": 0}, "rank=0")],
)
def test_bad_settings_are_refused(settings, reason):
    with pytest.raises(LongpatchError, match=reason):
        TempLoraGenerator(tiny_llama(), **settings)
