"""One layer of a `LambdaCache`: its sinks and a ring of its latest tokens."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .decode import Decode
from .layers import LayerSettings
from .recall.memory import Memory
from .rope import quarter_turn, rotate
from .step import Step


class LambdaLayer(CacheLayerMixin):
    """One layer's sinks and a ring of its latest tokens.

    `keys` [B, Hkv, 3 G + ring, d]: the sinks at position 0, the same a quarter turn on, the same where a decode step
    sees them, the ring. `values` [B, Hkv, G + ring, d]. Token `t` of the text sits at place `t % (L + slack)` of the
    ring, which grows to that size with the text unless `static`. `length` counts the tokens seen, `written` is the
    largest length the ring has held: entries from before `written - (L + slack)` are gone. All layers share these two.
    """

    is_sliding = False
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, settings: LayerSettings, kind: int, length: Tensor, written: Tensor, static: bool = False):
        super().__init__()
        self.config, self.rotated, self.kind = settings.config, settings.rotated, kind
        self.length, self.written, self.is_compileable = length, written, static
        self.ring_size = self.config.local_branch + self.config.slack
        self.ring_start = 0
        self.memory = None if self.config.recall is None else Memory(self.config.recall, self.ring_size)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffers(key_states, value_states, key_states.shape[2])
        self.is_initialized = True

    def _buffers(self, key_states: Tensor, value_states: Tensor, tokens: int) -> list[Tensor]:
        """Room for the sinks and at least `tokens` ring entries; entries that were never written are never read.

        A static cache reads them, and masks them: they have to be numbers.
        """
        sinks = self.config.global_branch
        ring = self.ring_size if self.is_compileable else min(self.ring_size, max(64, tokens))
        buffers = []
        for states, fixed in ((key_states, 3 * sinks), (value_states, sinks)):
            shape = (*states.shape[:2], fixed + ring, states.shape[3])
            buffers.append(states.new_zeros(shape) if self.is_compileable else states.new_empty(shape))
            buffers[-1].narrow(2, 0, fixed).zero_()
        return buffers

    def _make_room(self, tokens: int) -> None:
        """Double the ring until `tokens` fit, or it has its full size."""
        room = self.keys.shape[2] - 3 * self.config.global_branch
        if tokens <= room or room == self.ring_size:
            return
        grown = self._buffers(self.keys, self.values, max(2 * room, tokens))
        for old, new in zip((self.keys, self.values), grown, strict=True):
            new[:, :, : old.shape[2]] = old
        self.keys, self.values = grown

    @property
    def sink_keys(self) -> Tensor:
        return self.keys[:, :, : self.config.global_branch]

    @property
    def sink_values(self) -> Tensor:
        return self.values[:, :, : self.config.global_branch]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in new keys and values [B, Hkv, n, d]; return all that their windows reach, wrapping at `ring_start`.

        In a decode step return the sinks, turned to where the new token sees them, and the ring.
        """
        (step,) = args
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if step.decodes is not None:
            return self._decode(key_states, value_states, step, step.decodes[self.kind])
        past, count = step.past, key_states.shape[2]
        keys, values = key_states.detach(), value_states.detach()
        if self.memory is not None:
            turned = rotate(keys, step.lookup.key_phase) if self.rotated else keys
            self.memory.append(turned, values, step.lookup.starts)
        differentiable = key_states.requires_grad or value_states.requires_grad
        in_ring = past > 0 and count <= self.config.slack + 1 and not differentiable
        window = None if in_ring or not past else self._window(past)
        self._keep_sinks(keys, values, step)
        self._make_room(int(past) + count)
        self._write(keys, values, past)
        if not in_ring:
            self.ring_start = 0
            if window is None:
                return key_states, value_states
            return torch.cat((window[0], key_states), dim=2), torch.cat((window[1], value_states), dim=2)
        length = past + count
        wrapped = max(step.written, length) > self.ring_size
        self.ring_start = length % self.ring_size if wrapped else 0
        held = self.ring_size if wrapped else length
        return self._ring(self.keys)[:, :, :held], self._ring(self.values)[:, :, :held]

    def _decode(self, key: Tensor, value: Tensor, step: Step, decode: Decode) -> tuple[Tensor, Tensor]:
        self._keep_sinks(key, value, step)
        sinks = self.config.global_branch
        if isinstance(decode.place, Tensor):
            self._ring(self.keys).index_copy_(2, decode.place[None], key)
            self._ring(self.values).index_copy_(2, decode.place[None], value)
        else:
            self._make_room(decode.held)
            self.keys.narrow(2, 3 * sinks + decode.place, 1).copy_(key)
            self.values.narrow(2, sinks + decode.place, 1).copy_(value)
        if not decode.sinks:
            return self.keys.narrow(2, 3 * sinks, decode.held), self.values.narrow(2, sinks, decode.held)
        if self.rotated and decode.cos is not None and decode.sin is not None:
            rotary_dim = decode.cos.shape[-1]
            whole = self.keys if rotary_dim == self.keys.shape[3] else self.keys.narrow(3, 0, rotary_dim)
            still, quarter, turned = (whole.narrow(2, part * sinks, sinks) for part in range(3))
            turned.copy_(torch.addcmul(still * decode.cos, quarter, decode.sin))
        values = self.values if decode.held == self.ring_size else self.values.narrow(2, 0, sinks + decode.held)
        return self.keys.narrow(2, 2 * sinks, sinks + decode.held), values

    def sinks(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, G, d] of the sinks; `key` and `value` are what `update` returned.

        While gradients flow, sinks that came with this forward are taken from there: the cache holds detached copies.
        """
        if step.sink_phase is None or not (key.requires_grad or value.requires_grad):
            return self.sink_keys, self.sink_values
        first_column = step.past + step.count - key.shape[2]
        fresh_keys, fresh_values, present = step.sinks(key, value, first_column, self.rotated)
        if present is None:
            return fresh_keys, fresh_values
        present = present[:, None, :, None]
        return torch.where(present, fresh_keys, self.sink_keys), torch.where(present, fresh_values, self.sink_values)

    def _ring(self, states: Tensor) -> Tensor:
        return states[:, :, self.config.global_branch * (3 if states is self.keys else 1) :]

    def _keep_sinks(self, keys: Tensor, values: Tensor, step: Step) -> None:
        if step.sink_phase is None or not self.config.global_branch:
            return
        sink_keys, sink_values, present = step.sinks(keys, values, step.past, self.rotated)
        if present is not None:
            present = present[:, None, :, None]
            sink_keys = torch.where(present, sink_keys, self.sink_keys)
            sink_values = torch.where(present, sink_values, self.sink_values)
        variants = (sink_keys, quarter_turn(sink_keys, step.sink_phase), sink_keys)
        self.keys.narrow(2, 0, 3 * self.config.global_branch).copy_(torch.cat(variants, dim=2))
        self.sink_values.copy_(sink_values)

    def _window(self, past: int) -> tuple[Tensor, Tensor]:
        """Copies of the cached keys and values that the next token's window reaches, in time order."""
        start = max(0, past - self.config.local_branch + 1)
        place = torch.arange(start, past, device=self.keys.device) % self.ring_size
        return self._ring(self.keys).index_select(2, place), self._ring(self.values).index_select(2, place)

    def _write(self, keys: Tensor, values: Tensor, past: int) -> None:
        count = min(keys.shape[2], self.ring_size)
        skipped = keys.shape[2] - count
        place = (past + skipped) % self.ring_size
        until_end = min(count, self.ring_size - place)
        for held, new in ((self._ring(self.keys), keys), (self._ring(self.values), values)):
            held[:, :, place : place + until_end] = new[:, :, skipped : skipped + until_end]
            if until_end < count:
                held[:, :, : count - until_end] = new[:, :, skipped + until_end :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.length) + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far, which is what positions and masks are made from; not the number held."""
        return int(self.length)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def removable(self) -> int:
        """How many of the latest tokens can be taken back exactly."""
        length, written = int(self.length), int(self.written)
        return length if written <= self.ring_size else self.config.slack - (written - length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)
            self._select_memory(torch.arange(len(self.keys)) // repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]
            self._select_memory(indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self._select_memory(beam_idx)

    def _select_memory(self, rows: Tensor) -> None:
        if self.memory is not None:
            old, self.memory = self.memory, self.memory.select(rows)
            old.reset()
