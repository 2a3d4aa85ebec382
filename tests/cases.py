"""Random calls of `lambda_attention` for hypothesis, and how every test of an implementation runs and compares them."""

import torch
from hypothesis import strategies as st

from longpatch_kernels import lambda_attention

ALL = {
    "batch": st.integers(1, 3),
    "key_heads": st.sampled_from([1, 2]),
    "group": st.sampled_from([1, 2, 3, 8]),
    "head_dim": st.sampled_from([8, 64, 100, 128]),
    "queries": st.integers(1, 5) | st.integers(1, 300),
    "cached": st.sampled_from([0, 0, 1, 7, 130]),
    "window": st.integers(1, 9) | st.integers(1, 400),
    "sinks": st.sampled_from([0, 1, 10, 70]),
    "recalled": st.booleans(),
    "extra_distance": st.sampled_from([0, 50]),
    "ring": st.sampled_from([None, None, int, torch.tensor]),
    "padding": st.booleans(),
    "far_mask": st.booleans(),
    "softcap": st.sampled_from([None, 5.0]),
    "alibi": st.booleans(),
    "scale": st.sampled_from([None, None, 0.3]),
    "token_first": st.booleans(),
    "through_lse": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def cases(**changed):
    """Random calls, some of ALL's properties drawn otherwise."""
    return st.fixed_dictionaries(ALL | changed)


def build(case, dtype):
    """Arguments of one call: standard-normal tensors with padding, far keys and a cache in front as the case says."""
    case = {"recalled": False, "scale": None, "token_first": False} | case
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*shape):
        made = torch.randn(*shape, generator=generator).to(dtype)
        return made.transpose(1, 2).contiguous().transpose(1, 2) if case["token_first"] else made

    batch, key_heads, queries, sinks = case["batch"], case["key_heads"], case["queries"], case["sinks"]
    heads, keys = key_heads * case["group"], queries + case["cached"]
    arguments = {
        "query": normal(batch, heads, queries, case["head_dim"]),
        "key": normal(batch, key_heads, keys, case["head_dim"]),
        "value": normal(batch, key_heads, keys, case["head_dim"]),
        "window": case["window"],
        "ring_start": case["ring"](keys // 2) if case["ring"] else 0,
        "softcap": case["softcap"],
        "scale": case["scale"],
    }
    if case["padding"]:
        arguments["first_valid"] = torch.randint(-3, keys, (batch,), generator=generator)
    if case["alibi"]:
        arguments["alibi_slopes"] = torch.rand(heads, generator=generator)
    if sinks:
        arguments |= {
            "query_far": normal(batch, heads, queries, case["head_dim"]),
            "key_far": normal(batch, key_heads, sinks, case["head_dim"]),
            "value_far": normal(batch, key_heads, sinks, case["head_dim"]),
            "far_distance": case["window"] + case["extra_distance"],
        }
        if case["recalled"]:  # in any order, in front of the keys, behind some queries' windows and within others'
            arguments["far_positions"] = torch.randint(-20, keys, (batch, sinks), generator=generator)
        elif case["padding"]:
            arguments["far_positions"] = arguments["first_valid"][:, None] + torch.arange(sinks)
        if case["far_mask"]:
            arguments["far_mask"] = torch.rand(batch, heads, queries, sinks, generator=generator) < 0.7
    return arguments


def run(arguments, implementation, dtype=None, through_lse=True, attention=lambda_attention):
    """Output, log-sum-exp and the gradients of every floating-point tensor that takes part in the attention."""
    arguments = dict(arguments)
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[name] = value.to(dtype or value.dtype).detach()
            if name != "alibi_slopes":
                leaves[name] = arguments[name].requires_grad_()
    out, lse = attention(**arguments, implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    loss = (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    if through_lse:
        visible = lse > -torch.inf
        loss = loss + (lse[visible] * torch.randn(lse.shape, generator=generator).to(lse)[visible]).sum()
    loss.backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def error(actual, expected):
    finite = expected > -torch.inf
    assert torch.equal(actual > -torch.inf, finite)
    return (actual[finite].double() - expected[finite]).abs().max().item() if finite.any() else 0.0


def compare(arguments, implementation, through_lse=True, tolerance=2e-5):
    """Everything `run` returns is that of the definition in float64, relative to the largest number of its kind."""
    expected = run(arguments, "reference", torch.float64, through_lse)
    actual = run(arguments, implementation, through_lse=through_lse)
    for name, reference in expected.items():
        visible = reference[reference > -torch.inf]
        largest = visible.abs().max().item() if visible.numel() else 0.0
        assert error(actual[name], reference) < tolerance * max(1.0, largest), name
