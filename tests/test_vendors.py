"""Other libraries' windowed attention composed into Λ-attention.

flash-attn and xformers need a GPU, so plain PyTorch functions of the same signatures stand in for them; what is tested
is everything around them. FlexAttention itself runs here, uncompiled, which gives a log-sum-exp on a CPU too.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longpatch_kernels import IMPLEMENTATIONS, lambda_attention, not_supported_reasons, vendors
from longpatch_kernels.flex import block_mask, window_mask
from tests.cases import build, cases, compare, error, run

CASES = cases(
    batch=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([16, 32]),
    queries=st.integers(1, 60),
    cached=st.sampled_from([0, 1, 30]),
    window=st.integers(1, 80),
    extra_distance=st.just(0),
    padding=st.just(False),
    softcap=st.just(None),
    alibi=st.just(False),
)


def dense(q, k, v, scale, left, softcap):
    """Scores, their soft-cap's derivative, heads first; q, k, v as [B, n, H, d], key heads repeated here."""
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores, slope = scale * q @ k.mT, 1.0
    if softcap:
        slope = 1 - torch.tanh(scores / softcap).square()
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    return scores.masked_fill((distance < 0) | (distance > left), -torch.inf), slope, q, k, v


def dense_backward(dout, q, k, v, out, lse, scale, left, softcap):
    """What the libraries' backward computes: weights from the lse given, delta from the out given."""
    heads = k.shape[2]
    scores, slope, q, k, v = dense(q, k, v, scale, left, softcap)
    dout, out = dout.transpose(1, 2).float(), out.transpose(1, 2).float()
    weights = (scores - lse[..., None]).exp()
    grad = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * slope * scale
    grad_key, grad_value = ((m.mT @ t).unflatten(1, (heads, -1)).sum(2) for m, t in ((grad, q), (weights, dout)))
    return tuple(t.transpose(1, 2) for t in (grad @ k, grad_key, grad_value))


def flash_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    assert causal
    assert (dropout_p, window_size_right, alibi_slopes, return_softmax) == (0.0, 0, None, False)
    scores, _, _, _, v = dense(q, k, v, softmax_scale, window_size_left, softcap)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1), None, None


def flash_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert deterministic
    grads = dense_backward(dout, q, k, v, out, softmax_lse, softmax_scale, window_size_left, softcap)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)


def xformers_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert query.shape[2] == key.shape[2], "its backward has no grouped heads"
    scores, _, _, _, value = dense(query, key, value, scale, attn_bias.window_left, None)
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[1] % 32), value=torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), lse


def xformers_backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return dense_backward(grad, query, key, value, output, lse, scale, attn_bias.window_left, None)


def xformers_mask(window_left, window_right):
    assert window_right == 0
    return SimpleNamespace(window_left=window_left)


FLASH = SimpleNamespace(_flash_attn_forward=flash_forward, _flash_attn_backward=flash_backward)
XFORMERS = SimpleNamespace(
    attn_bias=SimpleNamespace(LocalAttentionFromBottomRightMask=xformers_mask),
    memory_efficient_attention_forward_requires_grad=xformers_forward,
    memory_efficient_attention_backward=xformers_backward,
)


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """The two libraries replaced, and their checks, which would refuse the CPU; counts the calls of `run`."""
    calls = {"flash_attn": 0, "xformers": 0, "flex": 0}

    def counted(name, vendor):
        def call(inputs):
            calls[name] += 1
            return vendor.run(inputs)

        return SimpleNamespace(run=call, not_supported_reasons=lambda inputs: [])

    with pytest.MonkeyPatch.context() as patch:
        parts = {"flash_attn": vendors.FlashAttn(lambda: FLASH), "xformers": vendors.Xformers(lambda: XFORMERS)}
        parts["flex"] = vendors.Flex(lambda: flex_attention)
        for name, vendor in parts.items():
            patch.setitem(IMPLEMENTATIONS, name, counted(name, vendor))
        yield calls


@settings(max_examples=25)
@given(case=CASES, softcap=st.sampled_from([None, 5.0]))
def test_flash_attn_composes_exactly(stand_ins, case, softcap):
    before = stand_ins["flash_attn"]
    compare(build(case | {"softcap": softcap}, torch.float32), "flash_attn")
    assert stand_ins["flash_attn"] == before + 1


@settings(max_examples=25)
@given(case=CASES)
def test_xformers_composes_exactly(stand_ins, case):
    before = stand_ins["xformers"]
    compare(build(case, torch.float32), "xformers")
    assert stand_ins["xformers"] == before + 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=15)
@given(case=CASES, softcap=st.sampled_from([None, 5.0]), alibi=st.booleans(), padding=st.booleans())
def test_flex_composes_exactly(stand_ins, case, softcap, alibi, padding):
    before = stand_ins["flex"]
    arguments = build(case | {"softcap": softcap, "alibi": alibi, "padding": padding}, torch.float32)
    exact = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in arguments.items()}
    expected = lambda_attention(**exact, implementation="reference")
    actual = lambda_attention(**arguments, implementation="flex")
    assert stand_ins["flex"] == before + 1
    for mine, reference in zip(actual, expected, strict=True):
        assert error(mine, reference) < 2e-5


@pytest.mark.parametrize(
    ("queries", "keys", "window", "sinks"), [(500, 500, 280, 3), (1, 700, 128, 0), (200, 512, 999, 0)]
)
def test_block_masks_say_what_looking_at_every_pair_says(queries, keys, window, sinks):
    def visible(batch, head, query, key):
        distance = query + keys - queries - key
        return (distance >= 0) & ((distance < window) | (key < sinks))

    mine = block_mask(visible, queries, keys, window, torch.device("cpu"), sinks=sinks)
    wanted = create_block_mask(visible, None, None, queries, keys, device="cpu")
    assert mine.shape == wanted.shape
    assert torch.equal(mine.to_dense(), wanted.to_dense())
    for row, count in enumerate(mine.full_kv_num_blocks[0, 0].tolist()):
        query = torch.arange(128 * row, min(128 * row + 128, queries))[:, None]
        for column in mine.full_kv_indices[0, 0, row, :count].tolist():
            assert visible(0, 0, query, torch.arange(128 * column, 128 * column + 128)).all()
    assert mine.full_kv_num_blocks.sum() > 0 or queries == 1


def test_layers_of_a_model_share_a_block_mask():
    device = torch.device("cpu")
    assert window_mask(64, 64, 8, device) is window_mask(64, 64, 8, device)
    assert window_mask(64, 64, 8, device) is not window_mask(64, 64, 9, device)


@pytest.mark.parametrize("implementation", ["flash_attn", "xformers"])
def test_gradient_without_a_gradient_of_the_lse(implementation):
    """The usual training step, where no extra columns are needed."""
    case = {"batch": 1, "key_heads": 1, "group": 3, "head_dim": 16, "queries": 40, "cached": 0, "window": 9, "sinks": 4}
    case |= {"extra_distance": 0, "ring": None, "padding": False, "far_mask": False, "softcap": None, "alibi": False}
    arguments = build(case | {"seed": 3}, torch.float32)
    gradients = []
    for name in (implementation, "reference"):
        leaves = {n: v.clone().requires_grad_() for n, v in arguments.items() if torch.is_tensor(v)}
        out, _ = lambda_attention(**(arguments | leaves), implementation=name)
        gradients.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-5, rtol=2e-5)


def inputs(**changes):
    from longpatch_kernels.inputs import LambdaInputs

    tensor = torch.zeros(1, 2, 4, 12, requires_grad=True)
    plain = {"query": tensor, "key": tensor, "value": tensor, "window": 2, "far": None, "first_valid": None}
    return LambdaInputs(**(plain | {"ring_start": 0, "scale": 1.0, "alibi_slopes": None, "softcap": None} | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device")
def test_every_reason_is_listed():
    x = inputs(alibi_slopes=torch.ones(2), softcap=2.0, first_valid=torch.zeros(1))
    flash, xformers = (vendors.VENDORS[name].not_supported_reasons(x) for name in ("flash_attn", "xformers"))
    for reasons in (flash, xformers):
        text = "; ".join(reasons)
        for part in ("CUDA device", "float32", "first_valid", "head size 12 is not a multiple of 8", "alibi_slopes"):
            assert part in text
    assert "softcap: xformers" in "; ".join(xformers)
    assert "softcap" not in "; ".join(flash)
    assert vendors.VENDORS["flex"].not_supported_reasons(x) == [
        "the tensors are on cpu; compiled FlexAttention gives no log-sum-exp there"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(vendors.VENDORS))
def test_the_library_itself(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = {"batch": 2, "key_heads": 2, "group": 4, "head_dim": 64, "queries": 300, "cached": 0, "window": 90}
    case |= {"sinks": 10, "extra_distance": 0, "ring": None, "padding": False, "far_mask": False, "softcap": None}
    arguments = build(case | {"alibi": False, "seed": 5}, torch.bfloat16)
    arguments = {n: v.cuda() if torch.is_tensor(v) else v for n, v in arguments.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, name, vendors.VENDORS[name])
        asked = {n: v.requires_grad_() if torch.is_tensor(v) else v for n, v in arguments.items()}
        if reasons := not_supported_reasons(name, **asked):
            pytest.skip("; ".join(reasons))
        for through_lse in (False, True):
            expected = run(arguments, "reference", torch.float64, through_lse)
            dense = run(arguments, "reference", through_lse=through_lse)
            actual = run(arguments, name, through_lse=through_lse)
            for part, wanted in expected.items():
                bound = 2 * error(dense[part], wanted) + 0.01 * wanted.abs().max().item()
                assert error(actual[part], wanted) <= bound, part


@pytest.mark.parametrize(
    ("module", "stand_ins"),
    [
        (
            "flash_attn.flash_attn_interface",
            {"_flash_attn_forward": flash_forward, "_flash_attn_backward": flash_backward},
        ),
        (
            "xformers.ops.fmha",
            {
                "memory_efficient_attention_forward_requires_grad": xformers_forward,
                "memory_efficient_attention_backward": xformers_backward,
            },
        ),
    ],
)
def test_stand_ins_take_what_the_libraries_take(module, stand_ins):
    library = pytest.importorskip(module)
    for name, stand_in in stand_ins.items():
        theirs, ours = (inspect.signature(f).parameters for f in (getattr(library, name), stand_in))
        for parameter in ours:
            assert parameter in theirs, f"{module}.{name} has no {parameter}"
            assert ours[parameter].kind == theirs[parameter].kind
        assert all(theirs[extra].default is not inspect.Parameter.empty for extra in theirs.keys() - ours.keys())
