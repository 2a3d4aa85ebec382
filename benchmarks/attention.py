"""Λ-attention on the CPU against full causal attention, FlexAttention and memory speed.

    python -m benchmarks.attention                        every case, about ten minutes on two cores
    python -m benchmarks.attention --only decode          cases whose name holds "decode"
    python -m benchmarks.attention --no-flex --rounds 5   no compiler at hand, or no patience

Every peer's result is compared with the definition in float64 before it is timed. Peers take turns within one process;
a figure is the median, and the ratio is against the first column of its row. Lines are added to --output.
With one thread it is CPU time that is measured, to which other programs on a busy machine add least.
"""

import argparse
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longpatch_kernels import lambda_attention
from longpatch_kernels.flex import block_mask, window_mask

from .interleaved import Case, Peer, measure, table

SINKS = 10
NAMES = ("query", "key", "value", "query_far", "key_far", "value_far")


def inputs(batch: int, heads: int, key_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype) -> dict:
    """Standard-normal arguments of one call; the sinks' values are those of the first keys, as in a model."""
    shapes = [(heads, queries), (key_heads, keys), (key_heads, keys), (heads, queries), (key_heads, SINKS)]
    made = [torch.randn(batch, head, tokens, dim, dtype=torch.float32).to(dtype) for head, tokens in shapes]
    return dict(zip(NAMES, (*made, made[2][:, :, :SINKS].clone()), strict=True))


def expected(call: dict, rows: slice, window: int, sinks: bool) -> Tensor:
    """Output of some query rows by the definition, in float64."""
    unseen = call["query"].shape[2] - rows.stop
    keys = slice(0, call["key"].shape[2] - unseen)
    part = {name: call[name].double()[:, :, rows] for name in ("query", "query_far")}
    part |= {name: call[name].double()[:, :, keys] for name in ("key", "value")}
    part |= {name: call[name].double() for name in ("key_far", "value_far")}
    if not sinks:
        part = {name: part[name] for name in NAMES[:3]}
    return lambda_attention(**part, window=window, implementation="reference")[0]


def samples(queries: int, window: int) -> list[slice]:
    """Rows at the start, where the window fills, in the middle and at the end."""
    starts = {0, min(window, queries) - 8, queries // 2, queries - 16}
    return [slice(max(0, start), min(queries, max(0, start) + 16)) for start in sorted(starts)]


def close(actual: Tensor, wanted: Tensor):
    tolerance = 1e-4 if actual.dtype == torch.float32 else 4 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


def peer(name: str, attend, call: dict, window: int, sinks: bool = True) -> Peer:
    """`attend()` returns the output of `call`'s attention with `window`, with or without sinks."""

    def verify():
        out = attend()
        for rows in samples(out.shape[2], window):
            close(out[:, :, rows], expected(call, rows, window, sinks))

    return Peer(name, attend, verify)


def lambda_of(call: dict, window: int, implementation: str) -> Tensor:
    return lambda_attention(**call, window=window, implementation=implementation)[0]


def flex_peers(call: dict, window: int) -> list[Peer]:
    """FlexAttention compiled for this shape: Λ in one call by a score_mod, and its window without sinks."""
    query, key, value = (call[name] for name in NAMES[:3])
    queries, scale = query.shape[2], query.shape[3] ** -0.5
    sink_scores = scale * call["query_far"] @ call["key_far"].mT

    def in_lambda(batch, head, i, j):
        return (i >= j) & ((i - j < window) | (j < SINKS))

    def score(score, batch, head, i, j):
        return torch.where((j < SINKS) & (i - j >= window), sink_scores[batch, head, i, j.clamp(max=SINKS - 1)], score)

    whole_mask = block_mask(in_lambda, queries, queries, window, query.device, sinks=SINKS)
    near_mask = window_mask(queries, queries, window, query.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    whole = partial(compiled, query, key, value, score_mod=score, block_mask=whole_mask, scale=scale)
    window_only = partial(compiled, query, key, value, block_mask=near_mask, scale=scale)
    return [
        peer("flex Λ", torch.no_grad()(whole), call, window),
        peer("flex window only", torch.no_grad()(window_only), call, window, sinks=False),
    ]


def prefill(queries: int, window: int, dtype: torch.dtype, key_heads: int = 8, flex: bool = False) -> list[Peer]:
    call = inputs(1, 8, key_heads, queries, queries, 64, dtype)
    query, key, value = (call[name] for name in NAMES[:3])
    full = partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=key_heads != 8)
    peers = [peer("sdpa causal", full, call, queries, sinks=False)]
    if flex:
        peers += flex_peers(call, window)
    for name in ("blocked", "auto"):
        peers.append(peer(name, partial(lambda_of, call, window, name), call, window))
    return peers


def training(queries: int, window: int) -> list[Peer]:
    """Forward and backward; verified by the gradients of a loss on the sampled rows."""
    call = {name: t.requires_grad_() for name, t in inputs(1, 8, 8, queries, queries, 64, torch.float32).items()}
    weight = torch.randn_like(call["query"])

    def full():
        return scaled_dot_product_attention(*(call[name] for name in NAMES[:3]), is_causal=True)

    def timed(attend):
        attend().backward(weight)
        return [tensor.grad for tensor in call.values()]

    def verify(attend, reach: int, sinks: bool):
        for rows in samples(queries, reach):
            _clear(call)
            attend()[:, :, rows].backward(weight[:, :, rows])
            actual = [tensor.grad for tensor in call.values()]
            _clear(call)
            expected(call, rows, reach, sinks).backward(weight[:, :, rows].double())
            for mine, tensor in zip(actual, call.values(), strict=True):
                if tensor.grad is not None:
                    close(mine, tensor.grad.double())

    peers = [Peer("sdpa causal", partial(timed, full), partial(verify, full, queries, False))]
    for name in ("blocked", "auto"):
        ours = partial(lambda_of, call, window, name)
        peers.append(Peer(name, partial(timed, ours), partial(verify, ours, window, True)))
    return peers


def _clear(call: dict):
    for tensor in call.values():
        tensor.grad = None


def decode(heads: int, key_heads: int, dim: int, dtype: torch.dtype, batch: int, window: int = 4096) -> list[Peer]:
    """One new token a row over a full window; the baseline reads as many bytes as the keys and values have."""
    call = inputs(batch, heads, key_heads, 1, window, dim, dtype)
    far = {"far_positions": torch.arange(SINKS) - SINKS}  # the sinks left the window long ago
    cache_bytes = call["key"].nbytes + call["value"].nbytes
    memory = torch.randn(cache_bytes // 4)
    wanted = lambda_attention(
        **{name: tensor.double() for name, tensor in call.items()}, **far, window=window, implementation="reference"
    )[0]

    def ours(implementation):
        return lambda_attention(**call, **far, window=window, implementation=implementation)[0]

    return [
        Peer("sum of as many bytes", memory.sum, lambda: close(memory.sum() / 1e4, memory.double().sum() / 1e4)),
        Peer("auto", partial(ours, "auto"), lambda: close(ours("auto"), wanted)),
        Peer("blocked", partial(ours, "blocked"), lambda: close(ours("blocked"), wanted)),
    ]


def all_cases(flex: bool) -> list[Case]:
    cases = []
    for queries, window in ((8192, 1024), (32768, 1024), (32768, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"prefill {queries}/{window} {_short(dtype)}"
            with_flex = flex and dtype == torch.float32
            setup = partial(prefill, queries, window, dtype, flex=with_flex)
            cases.append(Case(name, {"queries": queries, "window": window, "heads": 8, "head_dim": 64}, setup))
    settings = {"queries": 8192, "window": 1024, "heads": 8, "key_heads": 2, "head_dim": 64}
    cases.append(Case("prefill 8192/1024 f32 GQA 8/2", settings, partial(prefill, 8192, 1024, torch.float32, 2)))
    settings = {"queries": 8192, "window": 1024, "heads": 8, "head_dim": 64}
    cases.append(Case("train 8192/1024 f32", settings, partial(training, 8192, 1024)))
    for queries in (64, 128, 256, 512, 1024):
        settings = {"queries": queries, "window": 1024, "heads": 8, "head_dim": 64}
        cases.append(Case(f"within the window {queries}", settings, partial(prefill, queries, 1024, torch.float32)))
    for heads, key_heads, dim in ((8, 8, 64), (9, 3, 64), (32, 8, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            batch = 8 if key_heads * dim * dtype.itemsize > 512 else 24  # larger than the L3 cache
            settings = {"batch": batch, "window": 4096, "heads": heads, "key_heads": key_heads, "head_dim": dim}
            name = f"decode {heads}/{key_heads} d{dim} {_short(dtype)}"
            cases.append(Case(name, settings, partial(decode, heads, key_heads, dim, dtype, batch)))
    return cases


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--rounds", type=int, default=25, help="most rounds a case (default 25)")
    parser.add_argument("--seconds", type=float, default=30, help="time a case, once it has three rounds (default 30)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads (default 2, what the targets say)")
    parser.add_argument("--no-flex", action="store_true", help="leave out compiled FlexAttention")
    default = Path(__file__).parent / "results" / "cpu.jsonl"
    parser.add_argument("--output", type=Path, default=default, help="JSON lines are added here (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [case for case in all_cases(not arguments.no_flex) if arguments.only in case.name]
    if not cases:
        parser.error(f"no case's name holds {arguments.only!r}")
    clock = process_time if arguments.threads == 1 else perf_counter
    print(table(measure(cases, arguments.rounds, arguments.seconds, arguments.output, clock=clock)))


if __name__ == "__main__":
    main()
