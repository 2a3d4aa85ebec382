"""Learning: the gradient, rows of a batch, what is left behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from longpatch import LongpatchError, convert_model, temp_lora
from longpatch.temp_lora import LearnOptions
from longpatch.temp_lora.untouched import own_randomness
from tests.tiny import random_ids, tiny_llama

SETTINGS = {"rank": 4, "alpha": 8, "dropout": 0.0, "learning_rate": 1e-2}


def by_hand(model, ids, count, settings):
    """Loss and gradients of peft's own LoRA on the last `count` tokens, started from the same numbers."""
    with temp_lora(model, **settings) as learner:
        adapter = learner.start(1)
        downs = [down[0].detach().clone() for _, down, _ in adapter._views]
    peft = get_peft_model(
        model, LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=list(learner.targets))
    )
    lora = [module for name, module in peft.named_modules() if hasattr(module, "lora_A")]
    for module, down in zip(lora, downs, strict=True):
        module.lora_A["default"].weight.data = down
    logits = peft(ids).logits[:, -count - 1 : -1]
    loss = cross_entropy(logits.flatten(0, 1), ids[:, -count:].flatten())
    loss.backward()
    gradients = [(m.lora_A["default"].weight.grad, m.lora_B["default"].weight.grad) for m in lora]
    peft.unload()
    return loss.item(), gradients


@pytest.mark.parametrize("converted", [False, True])
def test_the_first_gradient_is_that_of_peft(converted):
    model, ids = tiny_llama(), random_ids(1, 50)
    if converted:
        convert_model(model, 16, 4)
    loss, expected = by_hand(model, ids, 20, SETTINGS)
    with temp_lora(model, epochs=1, **SETTINGS) as learner:
        learned = learner.learn(ids[:, :30], ids[:, 30:])
        assert learned.losses[0] == pytest.approx(loss, rel=1e-5)
        assert learned.nll.shape == (1, 20)
        torch.testing.assert_close(learned.nll.mean().item(), loss)
        for (_, down, up), (of_down, of_up) in zip(learner.adapter._views, expected, strict=True):
            assert down.grad is not None
            torch.testing.assert_close(down.grad[0], of_down, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(up.grad[0], of_up, atol=1e-6, rtol=1e-4)
            assert of_up.abs().max() > 0


def test_the_rate_warms_up_and_stays():
    """AdamW's first step moves every number that has a gradient by its rate; later ones by no more than about that."""
    ids, moves = random_ids(1, 50), []
    with temp_lora(tiny_llama(), epochs=1, warmup_steps=4, **SETTINGS) as learner:
        (weights,) = learner.start(1).weights
        for _ in range(6):
            before = weights.clone()
            learner.learn(ids[:, :30], ids[:, 30:])
            moves.append((weights - before).abs().max().item() / SETTINGS["learning_rate"])
    assert moves[0] == pytest.approx(0.25, rel=1e-3)
    assert 0.25 < moves[1] <= 0.51
    assert 0.5 < moves[3] <= 1.01
    assert max(moves) < 1.5


def test_learning_lowers_the_loss_and_only_inside():
    model, ids = tiny_llama(), random_ids(1, 60)
    before = model(ids).logits
    with temp_lora(model, epochs=8, **SETTINGS) as learner:
        learned = learner.learn(ids[:, :20], ids[:, 20:])
        assert learned.losses[-1] < 0.9 * learned.losses[0]
        assert learner.score(ids[:, :20], ids[:, 20:]).mean() < learned.losses[-1] + 0.1
        assert not torch.equal(model(ids).logits, before)
        with learner.adapter.disabled():
            assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_rows_learn_as_they_would_alone():
    ids = random_ids(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    allowed = torch.ones(3, 15, dtype=torch.bool)
    allowed[2, 5:] = False
    model = tiny_llama()
    with temp_lora(model, **SETTINGS) as learner:
        learned = learner.learn(ids[:, :25], ids[:, 25:], attention_mask=mask, loss_mask=allowed)
        together = learner.score(ids[:, :25], ids[:, 25:], mask)
    for row, first in enumerate((0, 7, 0)):
        own = ids[row : row + 1, first:]
        with temp_lora(model, **SETTINGS) as learner:
            alone = learner.learn(own[:, :-15], own[:, -15:], loss_mask=allowed[row : row + 1])
            torch.testing.assert_close(learned.nll[row], alone.nll[0], equal_nan=True, atol=1e-5, rtol=1e-5)
            scored = learner.score(own[:, :-15], own[:, -15:])
        torch.testing.assert_close(together[row], scored[0], atol=1e-4, rtol=1e-4)


def test_a_row_without_tokens_learns_nothing():
    model, ids = tiny_llama(), random_ids(2, 40)
    with temp_lora(model, **SETTINGS) as learner:
        learner.learn(ids[:, :20], ids[:, 20:])
        before = learner.adapter.weights[0].clone()
        allowed = torch.tensor([[True] * 20, [False] * 20])
        learner.learn(ids[:, :20], ids[:, 20:], loss_mask=allowed)
        assert torch.equal(learner.adapter.weights[0][1], before[1])
        assert not torch.equal(learner.adapter.weights[0][0], before[0])


@pytest.mark.parametrize("settings", [{"context_grad": False}, {"trainable": "queries"}], ids=str)
@pytest.mark.parametrize("converted", [False, True])
def test_a_detached_context_scores_the_same(settings, converted):
    model, ids = tiny_llama(), random_ids(2, 50)
    if converted:
        convert_model(model, 16, 4)
    with temp_lora(model, **SETTINGS) as learner:
        expected = learner.learn(ids[:, :30], ids[:, 30:])
    with temp_lora(model, **SETTINGS, **settings) as learner:
        learned = learner.learn(ids[:, :30], ids[:, 30:])
        assert learned.losses[1] < learned.losses[0]
        if "trainable" in settings:
            assert all(name.endswith("q_proj") for name in learner.targets)
    torch.testing.assert_close(learned.nll, expected.nll, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_weights():
    ids = random_ids(1, 50)
    weights = []
    for checkpointing in (False, True):
        model = tiny_llama()
        with temp_lora(model, gradient_checkpointing=checkpointing, **SETTINGS | {"dropout": 0.1}) as learner:
            learner.learn(ids[:, :30], ids[:, 30:])
            weights.append(learner.adapter.weights[0])
        assert not model.training
        assert not model.is_gradient_checkpointing
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)


def snapshot(model):
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": {
            name: {key: dict(value) if "hooks" in key else value for key, value in vars(module).items()}
            for name, module in model.named_modules()
        },
        "rng": torch.get_rng_state(),
    }


def assert_same(before, after):
    assert before["requires_grad"] == after["requires_grad"]
    assert torch.equal(before["rng"], after["rng"])
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])
    assert before["attributes"].keys() == after["attributes"].keys()
    for name, attributes in before["attributes"].items():
        assert attributes.keys() == after["attributes"][name].keys(), name
        for key, value in attributes.items():
            assert value is after["attributes"][name][key] or value == after["attributes"][name][key], (name, key)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, torch.OutOfMemoryError, Stop])
@pytest.mark.parametrize("peft", [False, True])
def test_whatever_happens_the_model_is_as_it_was(error, peft, monkeypatch):
    model, ids = tiny_llama(), random_ids(1, 40)
    if peft:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = snapshot(model)

    def run():
        with temp_lora(model, gradient_checkpointing=True, **SETTINGS | {"dropout": 0.1}) as learner:
            learner.learn(ids[:, :20], ids[:, 20:])
            if error:
                monkeypatch.setattr(learner, "_step", lambda learning: (_ for _ in ()).throw(error("now")))
            learner.learn(ids[:, :20], ids[:, 20:])

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert_same(before, snapshot(model))


def test_the_users_own_adapters_stay_and_count():
    model, ids = (
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)),
        random_ids(1, 40),
    )
    expected = model(ids).logits
    with temp_lora(model, **SETTINGS) as learner:
        assert len(learner.targets) == 14
        assert not any("lora_" in name for name in learner.targets)
        learned = learner.learn(ids[:, :20], ids[:, 20:])
        loss = cross_entropy(expected[0, 19:-1], ids[0, 20:])
        assert learned.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(model(ids).logits, expected)


def test_a_peft_config_is_taken_over():
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.2, target_modules=["up_proj"])
    with temp_lora(tiny_llama(), peft_config=config) as learner:
        options = learner.options
        assert (options.rank, options.alpha, options.dropout) == (3, 5, 0.2)
        assert [name.rsplit(".", 1)[-1] for name in learner.targets] == ["up_proj"] * 2


def test_alpha_is_the_rank_unless_it_is_given():
    for options, scale in (
        (LearnOptions(rank=16), 1.0),
        (LearnOptions().replace(rank=16), 1.0),
        (LearnOptions(rank=16, alpha=8), 0.5),
        (LearnOptions(peft_config=LoraConfig(r=4, lora_alpha=8, use_rslora=True)), 4.0),
    ):
        assert options.scale == scale
        assert options.to_dict()["alpha"] == scale * options.rank
        with temp_lora(tiny_llama(), options) as learner:
            assert learner.start(1).scale == scale


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["q_proj"]},
        {"target_parameters": ["weight"]},
        {"lora_bias": True},
        {"init_lora_weights": False},
        {"bias": "all"},
        {"layers_to_transform": [0]},
    ],
    ids=str,
)
def test_what_a_peft_config_asks_for_and_is_not_done_is_refused(settings):
    with pytest.raises(LongpatchError, match=f"peft_config.{next(iter(settings))}"):
        LearnOptions(peft_config=LoraConfig(target_modules=["v_proj"], **settings))


def test_a_rows_rate_warms_up_with_its_own_steps():
    ids, allowed = random_ids(2, 40), torch.tensor([[True] * 20, [False] * 20])
    with temp_lora(tiny_llama(), **SETTINGS) as learner:
        learner.learn(ids[:, :20], ids[:, 20:], loss_mask=allowed)
        learner.learn(ids[:, :20], ids[:, 20:])
        late = learner.start(2).weights[0][1].clone()
    with temp_lora(tiny_llama(), **SETTINGS) as learner:
        learner.learn(ids[1:, :20], ids[1:, 20:])
        torch.testing.assert_close(late, learner.start(1).weights[0][0], atol=1e-4, rtol=1e-3)


def test_random_generators_of_other_devices_are_left_alone(monkeypatch):
    for name in ("cuda", "mps", "xpu"):
        module = getattr(torch, name)
        for seed in ("manual_seed", "manual_seed_all"):
            if hasattr(module, seed):
                monkeypatch.setattr(module, seed, lambda value: pytest.fail("seeded"))
    with own_randomness(7, [torch.device("cpu")]):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_random_generators_of_a_gpu():
    device = torch.device("cuda", 0)
    before = torch.cuda.get_rng_state(device)
    for devices in ([], [device]):
        drawn = []
        for _ in range(2):
            with own_randomness(7, devices):
                drawn.append(torch.rand(3, device=device) if devices else None)
        assert torch.equal(torch.cuda.get_rng_state(device), before)
        assert not devices or torch.equal(drawn[0], drawn[1])


BAD = [
    ({"rank": 0}, "rank=0"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"learning_rate": -1}, "learning_rate=-1"),
    ({"trainable": "keys"}, "trainable='keys'"),
    ({"target_modules": ["nothing"]}, "'nothing'"),
    ({"colour": "red"}, "'colour'"),
    ({"peft_config": LoraConfig(use_dora=True)}, "use_dora"),
]


@pytest.mark.parametrize(("settings", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_bad_settings_are_refused(settings, reason):
    with pytest.raises(LongpatchError) as caught, temp_lora(tiny_llama(), **settings):
        pass
    assert reason in str(caught.value)


def test_wrong_shapes_are_refused():
    ids = random_ids(2, 20)
    with temp_lora(tiny_llama(), **SETTINGS) as learner:
        with pytest.raises(LongpatchError, match="context_ids has shape"):
            learner.learn(ids[:1], ids)
        with pytest.raises(LongpatchError, match="loss_mask has shape"):
            learner.learn(ids, ids, loss_mask=ids[:, :3])
        learner.learn(ids, ids)
        with pytest.raises(LongpatchError, match="adapters for 2 exist"):
            learner.learn(ids[:1], ids[:1])
