"""What reading and writing cost after a text of each length: bytes held, time per token."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arms import Arm
from .perplexity import MIB, cache_bytes
from .run import Measurement, Sample, Work


def memory_samples(lengths: Sequence[int]) -> list[Sample]:
    return [Sample({"length": length}, {}, None, length) for length in sorted(lengths)]


@dataclass
class Memory:
    """The evaluation, over `ids` [n] read from the start.

    Gives "cache" (bytes of keys and values held after the text), "peak_memory" (the most held while reading and
    writing: by the process, or on the model's CUDA device), "prefill" (median time per token over the last quarter of
    the text) and "decode" (median time of a token written after it).
    """

    model: Any
    ids: Tensor
    chunk: int = 512
    new_tokens: int = 32

    @torch.no_grad()
    def measure(self, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
        length = sample.settings["length"]
        text = self.ids.repeat(-(-length // len(self.ids)))[:length].to(self.model.device)
        reset_peak(self.model.device)
        cache, chunks, tokens = None, [], []
        for start in range(0, length, self.chunk):
            part = text[None, start : start + self.chunk]
            seconds, output = timed(self.model, input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            chunks.append(1000 * seconds / part.shape[1])
            work.tick(part.shape[1])
        held = cache_bytes(cache)
        following = output.logits[:, -1:].argmax(-1)
        for _ in range(self.new_tokens):
            seconds, output = timed(self.model, input_ids=following, past_key_values=cache, use_cache=True)
            cache, following = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(1000 * seconds)
        last = chunks[len(chunks) * 3 // 4 :]
        return [
            Measurement("cache", held / MIB, "MiB"),
            Measurement("peak_memory", peak_bytes(self.model.device) / MIB, "MiB"),
            Measurement("prefill", statistics.median(last), "ms/token", len(last)),
            Measurement("decode", statistics.median(tokens), "ms/token", len(tokens)),
        ]


def timed(model, **inputs) -> tuple[float, Any]:
    """Seconds that a forward takes, and its output."""
    began = time.perf_counter()
    output = model(**inputs)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began, output


def reset_peak(device: str | torch.device = "cpu") -> None:
    """Begin to count the peak anew, where the system lets us: CUDA, Linux."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: str | torch.device = "cpu") -> int:
    """The most memory held since `reset_peak`: on `device` where that is a CUDA device, of this process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
