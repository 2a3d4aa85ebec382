"""The ablations of the reference, each against its definition written out pair by pair in float64."""

import cmath
import math

import pytest
import torch

from longpatch_kernels import lambda_attention
from longpatch_kernels.reference import ablated

WINDOW, SINKS, DISTANCE = 5, 2, 7
FREQUENCIES = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
ARMS = {
    "lambda": {},
    "no cap": {"capped": False},
    "cap, full attention": {"middle": True},
    "full attention": {"middle": True, "capped": False},
    "triangle offset": {"middle": True, "triangle_offset": 1.5},
}


def rotate(states, positions):
    angle = positions[:, None].double() * FREQUENCIES
    turned = torch.complex(*states.chunk(2, dim=-1)) * torch.polar(torch.ones(()).double(), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def by_hand(query, key, value, slopes, first, capped=True, middle=False, triangle_offset=0.0):
    """One row: query [Hq, n, 6], key and value [Hkv, m, 6]; loops over heads, queries and keys."""
    heads, n, dim = query.shape
    group, m = heads // key.shape[0], key.shape[1]
    out = torch.zeros(heads, n, dim).double()
    for h in range(heads):
        for row in range(n):
            i = m - n + row
            scores = {}
            middles = [j for j in range(first + SINKS, i + 1) if i - j >= WINDOW]
            for j in range(first, i + 1):
                if j in middles and not middle:
                    continue
                e = i - j
                if capped:
                    e = min(e, DISTANCE) if middle or e < WINDOW else DISTANCE
                q, k = query[h, row].tolist(), key[h // group, j].tolist()
                total = 0.0
                for c, frequency in enumerate(FREQUENCIES.tolist()):
                    turn = cmath.exp(1j * frequency * e) if slopes is None else 1
                    total += (complex(q[c], q[c + 3]) * turn * complex(k[c], -k[c + 3])).real
                score = total / math.sqrt(dim)
                if slopes is not None:
                    score -= slopes[h].item() * e
                if j in middles:
                    score -= triangle_offset * math.log(len(middles))
                scores[j] = score
            weights = {j: math.exp(score) for j, score in scores.items()}
            for j, weight in weights.items():
                out[h, row] += weight / sum(weights.values()) * value[h // group, j]
    return out


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("alibi", [False, True], ids=["rope", "alibi"])
def test_each_ablation_is_its_definition(arm, alibi):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, count, 6, generator=generator, dtype=torch.float64)
        for heads, count in ((4, 9), (2, 14), (2, 14))
    )
    slopes, first = torch.rand(4, generator=generator) if alibi else None, torch.tensor([0, 3])
    options = {"window": WINDOW, "sinks": SINKS, "distance": DISTANCE, "first_valid": first, "alibi_slopes": slopes}
    out, _ = ablated(query, key, value, rotate=None if alibi else rotate, **options, **ARMS[arm])
    for row in range(2):
        expected = by_hand(query[row], key[row], value[row], slopes, int(first[row]), **ARMS[arm])
        torch.testing.assert_close(out[row], expected, atol=1e-12, rtol=1e-9)


def test_nothing_taken_away_is_lambda_attention():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 14, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    index = torch.arange(14)
    out, lse = ablated(query, key, value, window=WINDOW, sinks=SINKS, distance=DISTANCE, rotate=rotate)
    expected, expected_lse = lambda_attention(
        rotate(query, index),
        rotate(key, index),
        value,
        window=WINDOW,
        query_far=rotate(query, torch.full((14,), DISTANCE)),
        key_far=key[:, :, :SINKS],
        value_far=value[:, :, :SINKS],
        implementation="reference",
    )
    torch.testing.assert_close((out, lse), (expected, expected_lse))
