"""Does a model use what lies far back? Its loss when context beyond a distance is hidden or shuffled."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.documents import Document
from .arms import Arm
from .run import Measurement, Sample, Work, digest

ARMS = ("original", "lambda")
WAYS = ("hidden", "shuffled")


def windows(ids: Tensor, length: int, limit: int | None = None) -> list[Tensor]:
    """Stretches of `length` tokens of `ids` [n], spread evenly where there are more than `limit`."""
    starts = list(range(0, len(ids) - length + 1, length))
    if limit is not None and len(starts) > limit:
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    return [ids[start : start + length] for start in starts]


def window_samples(name: str, ids: Tensor, length: int, scored: int, limit: int) -> list[Sample]:
    """One sample a window of a text's `ids` [n]; of each, the last `scored` tokens count."""
    cut = windows(ids, length, limit)
    return [
        Sample({}, {"text": name, "window": number, "digest": digest(window)}, (window, scored), length)
        for number, window in enumerate(cut)
    ]


def answer_samples(
    name: str, documents: Iterable[Document], bos: int | None, distance: int, length: int
) -> Iterator[Sample]:
    """One sample a conversation that has `distance` tokens before its last answer, and no more than `length` in all."""
    for number, (ids, scored) in enumerate(answers(documents, bos)):
        if distance < len(ids) - scored and len(ids) <= length:
            yield Sample({}, {"text": name, "row": number, "digest": digest(ids)}, (ids, scored), len(ids))


def answers(documents: Iterable[Document], bos: int | None) -> Iterator[tuple[Tensor, int]]:
    """Of each conversation its tokens [n] up to the end of its last answer, without BOS, and that answer's size."""
    for document in documents:
        if document.trained is None:
            continue
        ids, trained = torch.from_numpy(document.ids.astype("int64")), torch.from_numpy(document.trained)
        end = int(trained.nonzero()[-1]) + 1
        begin = int((~trained[:end]).nonzero()[-1]) + 1
        yield ids[int(ids[0] == bos) : end], end - begin


@dataclass
class Distance:
    """The evaluation: "cost" in nats a token of losing what lies beyond each of `distances`, and the "loss" itself."""

    model: Any
    distances: Sequence[int]
    bos: int | None
    seed: int = 0

    def measure(self, arm: Arm, sample: Sample, work: Work) -> Iterator[Measurement]:
        window, scored = sample.content
        number = sample.identity["window" if "window" in sample.identity else "row"]
        read = distance_losses(self.model, window, self.distances, scored, self.bos, self.seed + number)
        _, _, full = next(read)
        for way, distance, loss in read:
            settings = {"way": way, "distance": distance}
            yield Measurement("cost", loss - full, "nat", settings=settings)
            yield Measurement("loss", loss, "nat", settings=settings, detail={"full": full})


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
        kept = model(input_ids=inputs, use_cache=False, logits_to_keep=scored + 1).logits
        logits = kept[0, -scored - 1 : -1].float()
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
