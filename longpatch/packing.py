"""4-bit weights whose products have gradients.

On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights when a model in eval mode first computes with them, rounds
their scales to bfloat16, and gives products with them no gradient: what is learned behind them is wrong without a word.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_FLAG = "support_avx512bf16_for_cpu"  # of each of its layers


def unpack(model: nn.Module) -> list[nn.Module]:
    """From now on no layer is repacked, and those that were are unpacked; returns the layers that it concerns."""
    layers = [module for module in model.modules() if vars(module).get(_FLAG)]
    for layer in layers:
        layer.state_dict()  # for which bitsandbytes unpacks them
        setattr(layer, _FLAG, False)
    return layers


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """The same inside the block."""
    layers = unpack(model)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, _FLAG, True)
