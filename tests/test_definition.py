"""Each layer of a converted model against the definition, from that layer's own raw queries, keys and values."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longpatch import LambdaCache, LambdaConfig, convert_llama_model
from longpatch.attention import attend
from longpatch.layers import LayerSettings
from longpatch.rope import ExactRotary, rotate
from longpatch.step import Step
from longpatch_kernels.reference import ablated
from tests.tiny import random_ids, read_in_chunks, tiny_llama

SHAPES = st.fixed_dictionaries(
    {
        "count": st.integers(1, 120),
        "window": st.integers(1, 50),
        "sinks": st.sampled_from([0, 1, 10]),
        "extra": st.sampled_from([0, 17]),
        "heads": st.sampled_from([(2, 2), (4, 2), (8, 1)]),
        "head_dim": st.sampled_from([64, 100, 128]),
        "padding": st.lists(st.integers(0, 20), min_size=1, max_size=3),
        "chunks": st.sampled_from([None, (1000,), (7,), (1,), (1, 30, 66)]),
        "many_keys": st.sampled_from([1, 2048]),
        "seed": st.integers(0, 1000),
    }
)


def definition(query, key, value, frequencies, window, sinks, distance, first, scale):
    """The definition (docs/design.md): visible iff d < L or j < G; encoded at distance d inside the window, D outside.

    Queries and keys [B, H, n, d] are raw, before any rotation; <R(e) q, k> is a product of complex numbers. Returns
    [B, n, H * d] in float64.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    count, half = query.shape[2], query.shape[3] // 2
    index = torch.arange(count)
    d = index[:, None] - index
    encoded = torch.where(d < window, d, distance).double()
    turn = torch.polar(torch.ones(()).double(), encoded[..., None] * frequencies)
    q, k = (torch.complex(x[..., :half].double(), x[..., half:].double()) for x in (query, key))
    scores = scale * torch.einsum("bhif,bhjf,ijf->bhij", q, k.conj(), turn).real
    j_in_row = index - first[:, None]
    visible = (d >= 0) & ((d < window) | (j_in_row < sinks)[:, None, None, :]) & (j_in_row >= 0)[:, None, None, :]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num()
    return (weights @ value.double()).transpose(1, 2).flatten(2)


def record_attention(model):
    """Raw q, k, v and the attention output of each layer, gathered over all forwards that follow."""
    seen = [{name: [] for name in ("q_proj", "k_proj", "v_proj", "out")} for _ in model.model.layers]
    for layer, record in zip(model.model.layers, seen, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).register_forward_hook(
                lambda module, args, output, to=record[name]: to.append(output)
            )
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, to=record["out"]: to.append(args[0]))
    return seen


@given(case=SHAPES)
def test_every_layer_follows_the_definition(case):
    heads, key_heads = case["heads"]
    head_dim = case["head_dim"]
    model = tiny_llama(
        case["seed"], num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim, hidden_size=32
    )
    frequencies = model.model.rotary_emb.inv_freq.double()
    distance = case["window"] + case["extra"]
    convert_llama_model(model, case["window"], case["sinks"], limit_distance=distance)
    first = torch.tensor(case["padding"])
    first = first - first.min()
    count = case["count"] + int(first.max())
    ids = random_ids(len(first), count, case["seed"])
    mask = (torch.arange(count) >= first[:, None]).long()
    seen = record_attention(model)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LambdaCache, "many_keys", case["many_keys"])
        if case["chunks"] is None:
            model(ids, attention_mask=mask, use_cache=False)
        else:
            read_in_chunks(model, ids, case["chunks"], mask)
    for record in seen:
        q, k, v, out = (torch.cat(record[name], dim=1) for name in ("q_proj", "k_proj", "v_proj", "out"))
        q, k, v = (x.unflatten(2, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
        expected = definition(q, k, v, frequencies, case["window"], case["sinks"], distance, first, head_dim**-0.5)
        real = mask.bool()
        bound = 3e-5 * max(1.0, expected[real].abs().max().item(), (q.abs().max() * k.abs().max()).item())
        assert (out.double() - expected)[real].abs().max() < bound


NORMAL = st.fixed_dictionaries(
    {
        "count": st.integers(1, 90),
        "cached": st.sampled_from([0, 0, 1, 37]),
        "window": st.integers(1, 40),
        "sinks": st.sampled_from([0, 1, 10]),
        "extra": st.sampled_from([0, 17]),
        "heads": st.sampled_from([(2, 2), (4, 2), (8, 1)]),
        "head_dim": st.sampled_from([64, 100, 128]),
        "padding": st.lists(st.integers(0, 20), min_size=1, max_size=2),
        "start": st.sampled_from([0, 1000, 200_000_000]),
        "seed": st.integers(0, 1000),
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25)
@given(case=NORMAL)
def test_attention_from_raw_normal_tensors_follows_the_definition(dtype, case):
    """Rotated, sinks brought to their distance, attended: output and gradients of raw q, k, v, keys cached in front.

    In bfloat16 the dense definition in bfloat16 says what rounding costs.
    """
    (heads, key_heads), head_dim, cached = case["heads"], case["head_dim"], case["cached"]
    first = torch.tensor(case["padding"])
    first = first - first.min()
    keys = case["count"] + cached + int(first.max())
    window, sinks, distance = case["window"], case["sinks"], case["window"] + case["extra"]
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    raw = [normal(len(first), count, keys, head_dim) for count in (heads, key_heads, key_heads)]
    rotary = ExactRotary(10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    positions = case["start"] + torch.arange(keys)
    config = LambdaConfig(window, sinks, distance)

    def ours(query, key, value):
        query, key = apply_rotary_pos_emb(query, key, *rotary(query, positions[None]))
        padding = first if first.any() else None
        step = Step.create(config, (LayerSettings(config),), rotary, positions[None, cached:], cached, padding, False)
        layer = types.SimpleNamespace(layer_idx=0)
        out, _ = attend(layer, query[:, :, cached:], key, value, None, head_dim**-0.5, longpatch=(step, None))
        return out.flatten(2)

    def exact(query, key, value):
        out = definition(query, key, value, rotary.frequencies, window, sinks, distance, first, head_dim**-0.5)
        return out[:, cached:]

    def dense(query, key, value):
        def turn(states, at):
            return rotate(states, rotary.phase(at[None]))

        out, _ = ablated(
            query, key, value, window=window, sinks=sinks, distance=distance, rotate=turn, first_valid=first
        )
        return out[:, :, cached:].transpose(1, 2).flatten(2)

    real = (torch.arange(cached, keys) >= first[:, None])[..., None]
    weights = normal(len(first), keys - cached, heads * head_dim) * real

    def results(attention, dtype):
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in raw]
        out = attention(*leaves).masked_fill(~real, 0)
        (out * weights.to(out.dtype)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for actual, expected, rounded in zip(
        results(ours, dtype), results(exact, torch.float64), results(dense, dtype), strict=True
    ):
        largest = expected.abs().max().item()
        bound = 2e-5 * max(1.0, largest)
        if dtype == torch.bfloat16:
            bound = max(bound, 2 * (rounded.double() - expected).abs().max().item() + 0.004 * largest)
        assert (actual.double() - expected).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    ids = random_ids(2, 150)
    exact = convert_llama_model(tiny_llama(initializer_range=0.1), 24, 4)(ids, use_cache=False).logits
    model = convert_llama_model(tiny_llama(initializer_range=0.1, dtype=dtype), 24, 4)
    dense = tiny_llama(initializer_range=0.1, dtype=dtype)(ids[:, :24]).logits.float()
    rounding = (dense - exact[:, :24]).abs().max()  # what this dtype costs the unconverted model
    one_shot = model(ids, use_cache=False).logits
    chunked, _ = read_in_chunks(model, ids, (40, 1, 7))
    assert one_shot.dtype == dtype
    assert (one_shot.float() - exact).abs().max() < 4 * rounding
    assert (chunked.float() - exact).abs().max() < 4 * rounding


def test_gradients_flow_as_the_definition_says():
    """With the window over everything, the converted model's gradients are the original's; past it, chunks agree."""
    ids = random_ids(2, 40)
    original, model = tiny_llama(), convert_llama_model(tiny_llama(), 40, 4)
    for candidate in (original, model):
        candidate.train()(ids, labels=ids).loss.backward()
    for (name, expected), actual in zip(original.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("extra", [0, 11])
def test_gradients_past_the_window(use_cache, extra):
    """Each layer's gradients of raw q, k, v, given that of its output, against autograd through the definition."""
    ids, first = random_ids(2, 60), torch.tensor([0, 5])
    mask = (torch.arange(60) >= first[:, None]).long()
    model = tiny_llama()
    frequencies = model.model.rotary_emb.inv_freq.double()
    convert_llama_model(model, 12, 3, limit_distance=12 + extra)
    seen = record_attention(model)
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    for record in seen:
        for (tensor,) in record.values():
            tensor.retain_grad()
    labels = ids.masked_fill(mask == 0, -100)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    for record in seen:
        raw = [record[name][0] for name in ("q_proj", "k_proj", "v_proj")]
        leaves = [tensor.detach().double().requires_grad_() for tensor in raw]
        heads = [leaf.unflatten(2, (-1, 16)).transpose(1, 2) for leaf in leaves]
        expected = definition(*heads, frequencies, 12, 3, 12 + extra, first, 0.25)
        expected.backward(record["out"][0].grad.double())
        for tensor, leaf in zip(raw, leaves, strict=True):
            assert (tensor.grad - leaf.grad).abs().max() < 2e-5 * max(1.0, leaf.grad.abs().max().item())
            assert leaf.grad.abs().max() > 1e-4
