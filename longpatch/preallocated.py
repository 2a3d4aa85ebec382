"""A full-length cache in memory that is taken once."""

from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .errors import LongpatchError

CALL = "PreallocatedCache"


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values: one tensor `[2, B, Hkv, max_length, d]`, of which `length` tokens are filled."""

    is_sliding = False
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, max_length: int, to_come: int, dtype: torch.dtype | None, device: torch.device | None):
        """`to_come`: layers that take memory from this one on, itself included."""
        super().__init__()
        self.max_length, self.to_come, self.asked = max_length, to_come, (dtype, device)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        dtype, device = self.asked
        self.dtype, self.device = dtype or key_states.dtype, torch.device(device or key_states.device)
        batch, heads, _, dim = key_states.shape
        shape = (2, batch, heads, self.max_length, max(dim, value_states.shape[-1]))
        needed = self.to_come * torch.Size(shape).numel() * self.dtype.itemsize
        free = free_bytes(self.device)
        if needed > free and not torch.compiler.is_compiling():
            reason = f"{needed:,} bytes for {self.max_length:,} tokens in {batch} rows, {free:,} are free"
            raise LongpatchError(CALL, [reason], "a smaller max_length or batch; see memory_bytes")
        keys, values = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.keys, self.values = keys[..., :dim], values[..., : value_states.shape[-1]]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, Hkv, n, d] in place; return views of all that is filled.

        Raises:
            LongpatchError: when they do not fit, or are of another number of rows; nothing is written.
        """
        batch = key_states.shape[0]
        if self.is_initialized and batch != self.keys.shape[0]:
            if self.length:
                raise LongpatchError(CALL, [f"{self.keys.shape[0]} rows are held, {batch} are to be added"], "reset()")
            del self.keys, self.values
            self.is_initialized = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, total = self.length, self.length + key_states.shape[2]
        if total > self.max_length:
            reason = f"full: {past} tokens are held, {total - past} more exceed max_length={self.max_length}"
            raise LongpatchError(CALL, [reason])
        returned = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[:, :, past:total] = new.detach()
            if new.requires_grad:  # gradients flow to what came with this forward, not into the cache
                returned.append(torch.cat((held[:, :, :past].to(new), new), dim=2))
            else:
                returned.append(held[:, :, :total].to(new))
        self.length = total
        return returned[0], returned[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to cut to."""
        count = int(tokens_to_remove)
        self.length = min(self.length, count) if count > 0 else max(0, self.length + count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows change places inside the memory that is there."""
        if self.length:
            rows = beam_idx.to(self.keys.device)
            for held in (self.keys, self.values):
                filled = held[:, :, : self.length]
                filled.copy_(filled.index_select(0, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class PreallocatedCache(Cache):
    """All keys and values of up to `max_length` tokens, written in place: for unconverted or interpolated models.

    transformers' own DynamicCache copies everything it holds at each token, and for a moment holds it twice. Here each
    layer takes its memory once, at its first update, where its keys are. Passed to `forward` or `generate` as
    `past_key_values`, it works with beams, `crop`, batches and chunked prefill. `memory_bytes` says beforehand what it
    takes.

    Args:
        config: config of the model.
        max_length: tokens it can hold.
        dtype: of what is stored; default: what the model computes in. Another one costs a copy at each step.
        device: default: that of each layer. Another one costs a copy at each step as well.
        offloading: keep the layers that do not run just now on the CPU; needs an accelerator.

    Raises:
        LongpatchError: when it would not fit into free memory, when it is full, and for another number of rows than it
            holds; after `reset()` any number will do. A converted model refuses it: it has a cache of its own.
    """

    layers: list[PreallocatedLayer]

    def __init__(
        self,
        config: PreTrainedConfig,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        offloading: bool = False,
    ):
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
            raise LongpatchError(CALL, [f"max_length={max_length!r} must be a positive integer"])
        if offloading and not torch.accelerator.is_available():
            raise LongpatchError(CALL, ["offloading=True on a machine without an accelerator"])
        count = _cached_layers(config)
        place = None if device is None else torch.device(device)
        at_once = 2 if offloading else count  # layers on the device: the one that runs, and the next
        super().__init__(
            [PreallocatedLayer(max_length, min(at_once, count - i), dtype, place) for i in range(count)],
            offloading=offloading,
        )

    @staticmethod
    def memory_bytes(
        config: PreTrainedConfig, max_length: int, batch: int = 1, dtype: torch.dtype | None = None
    ) -> int:
        """What it takes, in bytes: 2 * layers * batch * key_value_heads * max_length * head_dim * bytes_per_number.

        `dtype` defaults to the config's, else float32.

        Raises:
            LongpatchError: for families that cache compressed keys (MLA).
        """
        text: Any = config.get_text_config(decoder=True)
        if getattr(text, "kv_lora_rank", None) is not None:
            raise LongpatchError(
                "memory_bytes", [f"{text.model_type} compresses keys (MLA)"], "keys and values by head"
            )
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        if text.model_type == "falcon" and text.multi_query and not text.new_decoder_architecture:
            heads = 1
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        number: torch.dtype = dtype or getattr(text, "dtype", None) or torch.float32
        return 2 * _cached_layers(config) * batch * heads * max_length * dim * number.itemsize


def _cached_layers(config: PreTrainedConfig) -> int:
    text: Any = config.get_text_config(decoder=True)
    return text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken on all devices of this kind."""
    if device.type == "cuda":
        free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        cached = [torch.cuda.memory_reserved(i) - torch.cuda.memory_allocated(i) for i in range(len(free))]
        return sum(free) + sum(cached)
    return psutil.virtual_memory().available
