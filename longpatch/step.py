"""What all layers share during one forward of the model: computed once, handed down as a keyword argument."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import LambdaConfig
from .decode import Decode
from .layers import LayerSettings
from .recall.lookup import Lookup
from .rope import ExactRotary, Phase, rotate


@dataclass(frozen=True)
class Step:
    """One forward over `count` new tokens that follow `past` cached ones. Columns count from the first cached token."""

    layers: tuple[LayerSettings, ...]
    past: int | Tensor  # a tensor only in a compiled decode step
    count: int
    first_valid: Tensor | None  # [B]: column of each row's first token; None = 0 everywhere
    sink_columns: Tensor | None  # [1 or B, G]; None in a decode step once the cache holds them all
    sink_phase: Phase | None  # R(-position) of the sinks; None once the cache holds them all
    far_phase: Phase | None  # R(distance - position) of the new tokens; None where none of them sees a far sink
    written: int = 0  # the largest length the cache has held
    decodes: list[Decode] | None = None  # where one new token a row goes the short way: by `LambdaLayer.kind`
    lookup: Lookup | None = None  # what recall needs

    @classmethod
    def create(
        cls,
        config: LambdaConfig,
        layers: tuple[LayerSettings, ...],
        rotary: ExactRotary,
        positions: Tensor,
        past: int | Tensor,
        first_valid: Tensor | None,
        sinks_cached: bool,
        written: int = 0,
        decodes: list[Decode] | None = None,
    ) -> "Step":
        """`positions` [1 or B, count] are the position ids of the new tokens."""
        count = positions.shape[1]
        if decodes is not None and (sinks_cached or not config.global_branch):
            return cls(layers, past, count, first_valid, None, None, None, written, decodes)
        sink_columns = torch.arange(config.global_branch, device=positions.device)[None]
        if first_valid is not None:
            sink_columns = sink_columns + first_valid[:, None]
        sink_phase = None
        if not sinks_cached and config.global_branch:
            rows = max(len(sink_columns), len(positions))
            new = (sink_columns - past).clamp(0, count - 1).expand(rows, -1)
            # Sinks among the cached tokens of a growing cache: their ids are those just before the new ones.
            cached = positions[:, -1:] - (past + count - 1) + sink_columns
            sink_positions = torch.where(sink_columns < past, cached, positions.expand(rows, -1).gather(1, new))
            sink_phase = rotary.phase(-sink_positions)
        lookup = None
        if config.recall is not None:
            sizes = config.local_branch, config.global_branch
            lookup = Lookup.create(config.recall, *sizes, rotary, positions, int(past), first_valid)
        far = decodes is None and config.global_branch and past + count > config.local_branch
        far_phase = rotary.phase(config.distance - positions) if far else None
        return cls(layers, past, count, first_valid, sink_columns, sink_phase, far_phase, written, decodes, lookup)

    def sinks(
        self, key: Tensor, value: Tensor, first_column: int | Tensor, rotated: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pick the sinks out of keys and values [B, Hkv, m, d] whose first entry stands at `first_column`.

        Returns keys, turned back to position 0 where they were `rotated`, and values, `[B, Hkv, G, d]`, and which were
        there, `[1 or B, G]`; None: all of them.
        """
        assert self.sink_phase is not None
        assert self.sink_columns is not None
        count = self.sink_columns.shape[1]
        at_start = self.first_valid is None and not isinstance(first_column, Tensor) and first_column == 0
        if at_start and count <= key.shape[2]:
            key, value = key[:, :, :count], value[:, :, :count]
            return rotate(key, self.sink_phase) if rotated else key, value, None
        column = self.sink_columns - first_column
        present = (column >= 0) & (column < key.shape[2])
        index = column.clamp(0, key.shape[2] - 1)[:, None, :, None]
        index = index.expand(len(key), key.shape[1], -1, key.shape[3])
        key, value = key.gather(2, index), value.gather(2, index)
        return rotate(key, self.sink_phase) if rotated else key, value, present

    def to(self, device, non_blocking: bool = False) -> "Step":
        """The same step on another device: accelerate moves every argument of a layer that sits elsewhere."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        def move_phase(phase: Phase) -> Phase:
            return phase._replace(cos=move(phase.cos), sin=move(phase.sin))

        return replace(
            self,
            first_valid=None if self.first_valid is None else move(self.first_valid),
            sink_columns=None if self.sink_columns is None else move(self.sink_columns),
            sink_phase=None if self.sink_phase is None else move_phase(self.sink_phase),
            far_phase=None if self.far_phase is None else move_phase(self.far_phase),
            decodes=None if self.decodes is None else [decode.to(device, non_blocking) for decode in self.decodes],
            lookup=None if self.lookup is None else self.lookup.to(device, non_blocking),
        )
