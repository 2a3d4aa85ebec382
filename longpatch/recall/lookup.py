"""What recall needs to know of one forward: the same for all layers, computed once."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..rope import ExactRotary, Phase
from .settings import DEFAULT_DISTANCE, Recall


class Limits(NamedTuple):
    """Tokens from `first` to `last` are what some query may recall, from `all_first` to `all_last` what every one may.

    In every row some query may recall those up to `row_last`.
    """

    first: int
    all_first: int
    all_last: int
    row_last: int
    last: int


@dataclass(frozen=True)
class Lookup:
    """Tokens count from each row's first one after the sinks. `q` queries recall: the last ones of the forward."""

    settings: Recall
    sinks: int
    possible: bool  # whether any query may recall anything
    starts: list[int]  # [B or 1]: number of each row's first new token, negative in left padding
    first: Tensor  # [B or 1, q]: the oldest token that each query may recall
    last: Tensor  # [B or 1, q]: the latest one; before `first` where there is none
    distance: int  # at which recalled tokens appear
    key_phase: Phase  # R(-position) of the new tokens
    query_phase: Phase  # R(distance - position) of the last q

    @classmethod
    def create(
        cls,
        settings: Recall,
        window: int,
        sinks: int,
        rotary: ExactRotary,
        positions: Tensor,
        past: int,
        first_valid: Tensor | None,
    ) -> "Lookup":
        """`positions` [1 or B, count] are position ids of the new tokens; the first of these is in column `past`."""
        count = positions.shape[1]
        queries = count if settings.queries is None else min(settings.queries, count)
        columns = [0] if first_valid is None else first_valid.tolist()
        starts = [past - sinks - column for column in columns]
        token = torch.tensor(starts, device=positions.device)[:, None] + torch.arange(
            count - queries, count, device=positions.device
        )
        last = token - window
        oldest = torch.zeros_like(last) if settings.max_tokens is None else last - settings.max_tokens + 1
        first = oldest.clamp_min(0)
        latest = max(starts) + count - 1 - window
        possible = latest + 1 >= (settings.top_k if settings.block_tokens == 1 else 1)
        distance = default_distance(window) if settings.distance is None else settings.distance
        key_phase, query_phase = rotary.phase(-positions), rotary.phase(distance - positions[:, count - queries :])
        return cls(settings, sinks, possible, starts, first, last, distance, key_phase, query_phase)

    @cached_property
    def limits(self) -> Limits:
        """Read from the device once for all layers."""
        latest = self.last.amax(dim=1)
        of_all = self.first.min(), self.first.max(), self.last.min(), latest.min(), latest.max()
        return Limits(*torch.stack(of_all).tolist())

    def select(self, rows: Tensor) -> "Lookup":
        """Of some rows."""
        limits = (limit if len(limit) == 1 else limit[rows.to(limit.device)] for limit in (self.first, self.last))
        return self._limited(*limits)

    def part(self, start: int, stop: int) -> "Lookup":
        """Of the recalling queries `start` to `stop`."""
        return self._limited(self.first[:, start:stop], self.last[:, start:stop])

    def _limited(self, first: Tensor, last: Tensor) -> "Lookup":
        return replace(self, first=first, last=last)

    def to(self, device, non_blocking: bool = False) -> "Lookup":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        key_phase, query_phase = (
            p._replace(cos=move(p.cos), sin=move(p.sin)) for p in (self.key_phase, self.query_phase)
        )
        first, last = move(self.first), move(self.last)
        return replace(self, first=first, last=last, key_phase=key_phase, query_phase=query_phase)


def default_distance(window: int) -> int:
    return min(DEFAULT_DISTANCE, window // 2)
