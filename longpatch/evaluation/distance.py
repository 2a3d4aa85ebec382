"""Does a model use what lies far back? Its loss when context beyond a distance is hidden or shuffled."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.documents import Document

WAYS = ("hidden", "shuffled")


@dataclass(frozen=True)
class Effect:
    """What losing the context beyond `distance` tokens costs: mean and standard error over windows, in nats a token."""

    way: str
    distance: int
    cost: float
    error: float
    loss: float  # the loss itself, in nats
    windows: int

    def __str__(self) -> str:
        return (
            f"{self.way:<10}{self.distance:>8}{self.loss:>10.4f}{self.cost:>+10.4f} +- {self.error:.4f}"
            f"{'  used' if self.cost > 2 * self.error else '':<6}"
        )


def windows(ids: Tensor, length: int, limit: int | None = None) -> list[Tensor]:
    """Stretches of `length` tokens of `ids` [n], spread evenly where there are more than `limit`."""
    starts = list(range(0, len(ids) - length + 1, length))
    if limit is not None and len(starts) > limit:
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    return [ids[start : start + length] for start in starts]


def answers(documents: Iterable[Document], bos: int | None) -> Iterator[tuple[Tensor, int]]:
    """Of each conversation its tokens [n] up to the end of its last answer, without BOS, and that answer's size."""
    for document in documents:
        if document.trained is None:
            continue
        ids, trained = torch.from_numpy(document.ids.astype("int64")), torch.from_numpy(document.trained)
        end = int(trained.nonzero()[-1]) + 1
        begin = int((~trained[:end]).nonzero()[-1]) + 1
        yield ids[int(ids[0] == bos) : end], end - begin


@torch.no_grad()
def distance_losses(
    model: Any, window: Tensor, distances: Sequence[int], scored: int, bos: int | None, seed: int
) -> Iterator[tuple[str, int, float]]:
    """(way, distance, mean loss in nats) of the last `scored` tokens of `window` [n], and ("full", 0, loss) first.

    The first scored token keeps `distance` tokens before it, the last `scored - 1` more. "hidden": the text begins
    there. "shuffled": what lies before is in random order, so that length and words stay. Each text starts with `bos`.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = len(window) - scored

    def loss(ids: Tensor) -> float:
        ids = ids if bos is None else torch.cat((ids.new_tensor([bos]), ids))
        inputs = ids[None].to(model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[0, -scored - 1 : -1].float()
        return cross_entropy(logits, inputs[0, -scored:]).item()

    yield "full", 0, loss(window)
    for distance in distances:
        cut = begin - distance
        yield "hidden", distance, loss(window[cut:])
        mixed = window[:cut][torch.randperm(cut, generator=generator)]
        yield "shuffled", distance, loss(torch.cat((mixed, window[cut:])))


def doubling(length: int, scored: int, first: int = 16) -> list[int]:
    """16, 32, 64, ... below the longest distance that a window of `length` tokens has."""
    distances = []
    while first < length - scored:
        distances.append(first)
        first *= 2
    return distances


def effects(losses: Sequence[dict[tuple[str, int], float]]) -> list[Effect]:
    """Mean costs over windows; each dictionary is one window's {(way, distance): loss}."""
    table = []
    full = torch.tensor([window[("full", 0)] for window in losses])
    for way, distance in losses[0]:
        loss = torch.tensor([window[(way, distance)] for window in losses])
        cost = loss - full
        error = (cost.std() / len(losses) ** 0.5).item() if len(losses) > 1 else float("nan")
        if way in WAYS:
            table.append(Effect(way, distance, cost.mean().item(), error, loss.mean().item(), len(losses)))
    return sorted(table, key=lambda effect: (effect.way, effect.distance))


def farthest_used(table: Sequence[Effect], way: str) -> int:
    """Largest distance beyond which context still lowers the loss by more than two standard errors; 0: none."""
    return max((e.distance for e in table if e.way == way and e.cost > 2 * e.error), default=0)
