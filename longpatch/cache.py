"""The constant-memory cache of a converted model."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from longpatch_kernels import not_supported_reasons

from .config import LambdaConfig
from .decode import Decode
from .errors import LongpatchError
from .layers import layer_settings
from .padding import Padding
from .recall.memory import Memory
from .ring import LambdaLayer
from .rope import ExactRotary
from .step import Step


class LambdaCache(Cache):
    """Sinks and a ring of the latest tokens: constant memory, however long the text.

    It reports the true number of tokens seen, and works with one-shot and chunked prefill, beams, batches, continued
    generations and `crop` (exact for the last `slack` tokens). It grows up to this many bytes and no further::

        2 * layers * batch * key_value_heads * (2 * global_branch + local_branch + slack) * head_dim * bytes_per_number

    With recall each layer also has a `longpatch.recall.memory.Memory`, which grows with the text.

    Layers that slide in a model that has full layers too hold their own `sliding_window + slack` tokens and no sinks.

    Args:
        config: config of a converted model (`model.config`).
        offloading: keep the layers that do not run just now on the CPU.
        static: take all of the memory at the first token, so that every decode step has the same shapes: with
            `torch.compile` one graph serves all of them.

    Raises:
        LongpatchError: if the config is not that of a converted model.
    """

    layers: list[LambdaLayer]
    many_keys = 2048  # of all rows: from here on a decode step gains more by `lambda_attention` than it takes to call

    def __init__(self, config: PreTrainedConfig, offloading: bool = False, static: bool = False):
        marker = getattr(config, "longpatch", None)
        if marker is None:
            raise LongpatchError("LambdaCache", ["config has no longpatch settings"], "the config of a converted model")
        self.config, self.static = LambdaConfig(**marker), static
        if static and self.config.recall is not None:
            raise LongpatchError("LambdaCache", ["static=True, but what recall remembers grows"], "static=False")
        # Tensors, so that a compiled graph can count; on the CPU, so that reading them waits for no GPU.
        self.length, self.written = torch.tensor(0), torch.tensor(0)
        settings = layer_settings(config, self.config)
        self.kinds = list(dict.fromkeys(layer.config for layer in settings))
        layers: Any = [
            LambdaLayer(layer, self.kinds.index(layer.config), self.length, self.written, static) for layer in settings
        ]
        super().__init__(layers, offloading=offloading)
        self.padding = Padding()
        self._step: Step | None = None

    def begin(self, step: Step, padding: Padding) -> None:
        """Announce the forward that is about to happen; `update` needs to know the rows' padding and phases."""
        self._step, self.padding = step, padding

    def end(self) -> None:
        """Count the tokens of the forward that has happened: one that failed half-way has not."""
        step, self._step = self._step, None
        if step is None:
            return
        if isinstance(step.past, Tensor):
            self.length += step.count
            torch.maximum(self.length, self.written, out=self.written)
        else:
            self.length.fill_(step.past + step.count)
            self.written.fill_(max(step.written, step.past + step.count))

    def counts(self, short: bool) -> tuple[int | Tensor, int]:
        """Tokens seen, and the largest number that were; in a compiled decode step a tensor, and nothing."""
        if short and torch.compiler.is_compiling():
            return self.length, 0
        return int(self.length), int(self.written)

    def decodes(self, rotary: ExactRotary, positions: Tensor, past, written: int, first_valid) -> list[Decode]:
        """What the short way of the next token needs, for each kind of layer."""
        layer, many = self.layers[0], torch.inf
        rows, most = len(layer.values), max(kind.local_branch + kind.slack for kind in self.kinds)
        if not self.static and rows * min(past + 1, most) >= self.many_keys and self._has_kernel:
            many = self.many_keys / rows
        return [
            Decode.create(kind, rotary, positions, past, written, first_valid, layer.dtype, many) for kind in self.kinds
        ]

    @functools.cached_property
    def _has_kernel(self) -> bool:
        """Whether our own kernel can read what is held; where it has never been used the question compiles it."""
        values = self.layers[0].values
        return not not_supported_reasons("native", values[:, :, :1], values, values, window=1)

    def memories(self) -> list[Memory]:
        """What the layers that recall remember."""
        return [layer.memory for layer in self.layers if layer.memory is not None]

    def reads_shortly(self, count: int) -> bool:
        """Whether the next `count` tokens can take the short way of `Decode`, which has no gradients."""
        if count != 1 or torch.is_grad_enabled() or self.config.implementation != "auto":
            return False
        if self.config.recall is not None:
            return False
        layer = self.layers[0]
        if torch.compiler.is_compiling():
            return self.static
        return layer.is_initialized and layer.device.type == "cpu" and layer.dtype in (torch.float32, torch.float64)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, Hkv, n, d]; return those that the new tokens' windows reach."""
        if self._step is None:
            raise LongpatchError(
                "LambdaCache.update", ["the model is not converted"], "model(...) after convert_model(model)"
            )
        return super().update(key_states, value_states, layer_idx, self._step)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, which is what positions and masks are made from; not the number held."""
        return int(self.length)

    def has_sinks(self, length: int | Tensor) -> bool:
        """Whether every row's sinks are in, so that none can be among later tokens; False if that is unknown."""
        if isinstance(length, Tensor):
            return False
        latest = 0 if self.padding.first_valid is None else int(self.padding.first_valid.max())
        return length >= latest + self.config.global_branch

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
        self.length -= count
        for memory in self.memories():
            memory.crop(count)
        if self.padding.first_valid is not None:
            self.padding = Padding(self.padding.first_valid.clamp_max(length - count), self.padding.right)

    def reset(self) -> None:
        super().reset()
        self.length.zero_()
        self.written.zero_()
        self.padding = Padding()
        for memory in self.memories():
            memory.reset()

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
