"""flash-attn and xformers as the window part of a composed Λ-attention. Imported on first use."""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from . import compose
from .flex import Flex
from .inputs import LambdaInputs

WIDEST_HEAD = 256


def shared_reasons(x: LambdaInputs, module: str, package: str) -> list[str]:
    """What stops the libraries that are compiled for CUDA and know neither padding nor positional biases like ours."""
    reasons = []
    if importlib.util.find_spec(module) is None:
        reasons.append(f"{package} is not installed")
    if x.query.device.type != "cuda":
        reasons.append(f"the tensors are on {x.query.device}; {package} needs a CUDA device")
    if x.query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {x.query.dtype}; {package} takes float16 and bfloat16")
    if x.first_valid is not None:
        reasons.append(f"first_valid: {package} has no left padding beside a window")
    if x.query.shape[-1] % 8:
        reasons.append(f"head size {x.query.shape[-1]} is not a multiple of 8")
    widest = WIDEST_HEAD
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in x.tensors):
        widest -= 8  # the columns that carry the gradient of the log-sum-exp
    if x.query.shape[-1] > widest:
        reasons.append(f"head size {x.query.shape[-1]} is above {widest}")
    return reasons


def token_major(tensor: Tensor) -> Tensor:
    """[B, H, n, d] as [B, n, H, d], and back; no copy."""
    return tensor.transpose(1, 2)


class FlashAttn:
    """FlashAttention 2 (Dao, arXiv 2307.08691). Its raw functions, because the public ones hide the backward."""

    def __init__(self, library: Callable | None = None):
        self.library = library or functools.cache(lambda: importlib.import_module("flash_attn.flash_attn_interface"))

    def not_supported_reasons(self, inputs: LambdaInputs) -> list[str]:
        reasons = shared_reasons(inputs, "flash_attn", "flash-attn")
        if inputs.alibi_slopes is not None:
            reasons.append("alibi_slopes: flash-attn leaves the query's own term out of its log-sum-exp")
        return reasons

    def run(self, inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
        return compose.attend(inputs.in_time_order(), self)

    def settings(self, x: LambdaInputs) -> dict:
        softcap = 0.0 if x.softcap is None else x.softcap
        window = {"causal": True, "window_size_left": x.window - 1, "window_size_right": 0}
        return {"dropout_p": 0.0, "softmax_scale": x.scale, **window, "softcap": softcap, "alibi_slopes": None}

    def forward(self, x: LambdaInputs) -> tuple[Tensor, Tensor]:
        q, k, v = (token_major(t) for t in (x.query, x.key, x.value))
        out, lse, *_ = self.library()._flash_attn_forward(q, k, v, **self.settings(x), return_softmax=False)
        return token_major(out), lse

    def backward(self, x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, grad_out = (token_major(t).contiguous() for t in (x.query, x.key, x.value, out, grad_out))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self.library()._flash_attn_backward(
            grad_out, q, k, v, out, lse.contiguous(), dq, dk, dv, **self.settings(x), deterministic=True
        )
        return token_major(dq), token_major(dk), token_major(dv)


class Xformers:
    """xformers' memory-efficient attention with a local mask; its backward wants repeated key heads."""

    def __init__(self, library: Callable | None = None):
        self.library = library or functools.cache(lambda: importlib.import_module("xformers.ops.fmha"))

    def not_supported_reasons(self, inputs: LambdaInputs) -> list[str]:
        reasons = shared_reasons(inputs, "xformers", "xformers")
        for name in ("alibi_slopes", "softcap"):
            if getattr(inputs, name) is not None:
                reasons.append(f"{name}: xformers' local attention has none")
        return reasons

    def run(self, inputs: LambdaInputs) -> tuple[Tensor, Tensor]:
        return compose.attend(inputs.in_time_order(), self)

    def arguments(self, x: LambdaInputs) -> tuple[tuple[Tensor, ...], dict]:
        bias = self.library().attn_bias.LocalAttentionFromBottomRightMask(window_left=x.window - 1, window_right=0)
        repeated = (x.query, *(t.repeat_interleave(x.group, dim=1) for t in (x.key, x.value)))
        return tuple(token_major(t) for t in repeated), {"attn_bias": bias, "p": 0.0, "scale": x.scale}

    def forward(self, x: LambdaInputs) -> tuple[Tensor, Tensor]:
        tensors, settings = self.arguments(x)
        out, lse = self.library().memory_efficient_attention_forward_requires_grad(*tensors, **settings)
        return token_major(out), lse[..., : x.query_count]  # some of its kernels pad the log-sum-exp

    def backward(self, x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tensors, settings = self.arguments(x)
        grad_query, *rest = self.library().memory_efficient_attention_backward(
            token_major(grad_out).contiguous(), token_major(out).contiguous(), lse.contiguous(), *tensors, **settings
        )
        grad_key, grad_value = (token_major(t).unflatten(1, (-1, x.group)).sum(dim=2) for t in rest)
        return token_major(grad_query), grad_key, grad_value


VENDORS = {"flash_attn": FlashAttn(), "xformers": Xformers(), "flex": Flex()}
