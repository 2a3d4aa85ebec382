"""The constant-memory cache of a converted model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .config import LambdaConfig
from .errors import LongpatchError
from .layers import LayerSettings, layer_settings
from .padding import Padding
from .step import Step


class LambdaLayer(CacheLayerMixin):
    """One layer's keys and values: `[B, Hkv, G + L + slack, d]` each, sinks first, then a ring of the latest tokens.

    Sinks are kept turned back to position 0. Token `t` of the text sits at place `t % (L + slack)` of the ring.
    `written` is the largest length the ring has held: entries from before `written - (L + slack)` are gone.
    """

    is_sliding = False
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, settings: LayerSettings):
        super().__init__()
        self.config, self.rotated = settings.config, settings.rotated
        self.ring_size = self.config.local_branch + self.config.slack
        self.length = self.written = self.ring_start = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        tokens = self.config.global_branch + self.ring_size
        self.keys, self.values = (
            states.new_zeros((*states.shape[:2], tokens, states.shape[3])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    @property
    def sink_keys(self) -> Tensor:
        return self.keys[:, :, : self.config.global_branch]

    @property
    def sink_values(self) -> Tensor:
        return self.values[:, :, : self.config.global_branch]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in new keys and values [B, Hkv, n, d]; return all that their windows reach, wrapping at `ring_start`."""
        (step,) = args
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, count = self.length, key_states.shape[2]
        assert past == step.past
        self._keep_sinks(key_states.detach(), value_states.detach(), step)
        differentiable = key_states.requires_grad or value_states.requires_grad
        in_ring = past > 0 and count <= self.config.slack + 1 and not differentiable
        window = None if in_ring else self._window()
        self._write(key_states.detach(), value_states.detach())
        self.length = past + count
        self.written = max(self.written, self.length)
        if window is not None:
            self.ring_start = 0
            if not past:
                return key_states, value_states
            return torch.cat((window[0], key_states), dim=2), torch.cat((window[1], value_states), dim=2)
        wrapped = self.written > self.ring_size
        self.ring_start = self.length % self.ring_size if wrapped else 0
        held = self.ring_size if wrapped else self.length
        return self._ring(self.keys)[:, :, :held], self._ring(self.values)[:, :, :held]

    def sinks(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, G, d] of the sinks; `key` and `value` are what `update` returned.

        While gradients flow, sinks that came with this forward are taken from there: the cache holds detached copies.
        """
        if step.sink_phase is None or not (key.requires_grad or value.requires_grad):
            return self.sink_keys, self.sink_values
        fresh_keys, fresh_values, present = step.sinks(key, value, self.length - key.shape[2], self.rotated)
        present = present[:, None, :, None]
        return torch.where(present, fresh_keys, self.sink_keys), torch.where(present, fresh_values, self.sink_values)

    def _ring(self, states: Tensor) -> Tensor:
        return states[:, :, self.config.global_branch :]

    def _keep_sinks(self, keys: Tensor, values: Tensor, step: Step) -> None:
        if step.sink_phase is None or not self.config.global_branch:
            return
        sink_keys, sink_values, present = step.sinks(keys, values, self.length, self.rotated)
        present = present[:, None, :, None]
        self.sink_keys.copy_(torch.where(present, sink_keys, self.sink_keys))
        self.sink_values.copy_(torch.where(present, sink_values, self.sink_values))

    def _window(self) -> tuple[Tensor, Tensor]:
        """Copies of the cached keys and values that the next token's window reaches, in time order."""
        start = max(0, self.length - self.config.local_branch + 1)
        place = torch.arange(start, self.length, device=self.keys.device) % self.ring_size
        return self._ring(self.keys).index_select(2, place), self._ring(self.values).index_select(2, place)

    def _write(self, keys: Tensor, values: Tensor) -> None:
        count = min(keys.shape[2], self.ring_size)
        skipped = keys.shape[2] - count
        place = (self.length + skipped) % self.ring_size
        until_end = min(count, self.ring_size - place)
        for held, new in ((self._ring(self.keys), keys), (self._ring(self.values), values)):
            held[:, :, place : place + until_end] = new[:, :, skipped : skipped + until_end]
            held[:, :, : count - until_end] = new[:, :, skipped + until_end :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far, which is what positions and masks are made from; not the number held."""
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        super().reset()
        self.length = self.written = self.ring_start = 0

    def removable(self) -> int:
        """How many of the latest tokens can be taken back exactly."""
        if self.written <= self.ring_size:
            return self.length
        return self.config.slack - (self.written - self.length)

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class LambdaCache(Cache):
    """Sinks and a ring of the latest tokens: constant memory, however long the text.

    It reports the true number of tokens seen, and works with one-shot and chunked prefill, beams, batches, continued
    generations and `crop` (exact for the last `slack` tokens). Memory in bytes, for any number of tokens::

        2 * layers * batch * key_value_heads * (global_branch + local_branch + slack) * head_dim * bytes_per_number

    Layers that slide in a model that has full layers too hold their own `sliding_window + slack` tokens and no sinks.

    Args:
        config: config of a converted model (`model.config`).
        offloading: keep the layers that do not run just now on the CPU.

    Raises:
        LongpatchError: if the config is not that of a converted model.
    """

    layers: list[LambdaLayer]

    def __init__(self, config: PreTrainedConfig, offloading: bool = False):
        marker = getattr(config, "longpatch", None)
        if marker is None:
            raise LongpatchError("LambdaCache", ["config has no longpatch settings"], "the config of a converted model")
        self.config = LambdaConfig(**marker)
        layers: list[Any] = [LambdaLayer(settings) for settings in layer_settings(config, self.config)]
        super().__init__(layers, offloading=offloading)
        self.padding = Padding()
        self._step: Step | None = None

    def begin(self, step: Step, padding: Padding) -> None:
        """Announce the forward that is about to happen; `update` needs to know the rows' padding and phases."""
        self._step, self.padding = step, padding

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, Hkv, n, d]; return those that the new tokens' windows reach."""
        if self._step is None:
            raise LongpatchError(
                "LambdaCache.update", ["the model is not converted"], "models after convert_model(model)"
            )
        return super().update(key_states, value_states, layer_idx, self._step)

    def has_sinks(self) -> bool:
        """Whether every row's sinks are in, so that none of them can be among later tokens."""
        latest = 0 if self.padding.first_valid is None else int(self.padding.first_valid.max())
        return self.get_seq_length() >= latest + self.config.global_branch

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to cut to, as in DynamicCache.

        Raises:
            LongpatchError: when more tokens are to go than the ring can restore; the cache is then as it was.
        """
        length = self.get_seq_length()
        count = int(tokens_to_remove)
        count = max(0, length - count) if count > 0 else -count
        possible = min(layer.removable() for layer in self.layers)
        if count > possible:
            raise LongpatchError(
                "LambdaCache.crop",
                [f"{count} tokens to remove, but the ring can restore {possible}"],
                f"up to {self.config.slack} tokens (LambdaConfig.slack)",
            )
        for layer in self.layers:
            layer.crop(count)
        if self.padding.first_valid is not None:
            self.padding = Padding(self.padding.first_valid.clamp_max(length - count), self.padding.right)

    def reset(self) -> None:
        super().reset()
        self.padding = Padding()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_padding(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.padding.first_valid is not None:
            self.padding = Padding(self.padding.first_valid.repeat_interleave(repeats), self.padding.right)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_padding(indices)

    def _select_padding(self, rows: Tensor) -> None:
        if self.padding.first_valid is not None:
            self.padding = Padding(
                self.padding.first_valid[rows.to(self.padding.first_valid.device)], self.padding.right
            )
