"""Tiny models of every family, and the reference: the definition, dense, from raw queries, keys and values."""

import copy
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from tests.recalling import best_blocks, best_tokens
from tests.tiny import VOCABULARY

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
THETA = {"rope_theta": 100.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | THETA
PER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
}


@dataclass(frozen=True)
class Case:
    """What a family is, said a second time: settings of a tiny model, and the facts that the reference needs.

    Attributes:
        model_type: as in the config; None where it is the id of the case.
        interleaved: rotary pairs are (0, 1), (2, 3), ...
        unrotated: layers without rotary phases.
        sliding: layers that keep their own window.
    """

    settings: dict = field(default_factory=dict)
    model_type: str | None = None
    interleaved: bool = False
    unrotated: tuple[int, ...] = ()
    sliding: tuple[int, ...] = ()


CASES = {
    "cohere": Case(interleaved=True),
    "cohere-qk_norm": Case({"use_qk_norm": True}, "cohere", interleaved=True),
    "cohere2": Case(MIXED, interleaved=True, unrotated=(1,), sliding=(0,)),
    "falcon": Case({"num_kv_heads": 1, "alibi": False}),
    "falcon-yarn": Case({"num_kv_heads": 1, "alibi": False, "rope_parameters": YARN}, "falcon"),
    "falcon-multi_head": Case({"alibi": False, "multi_query": False}, "falcon"),
    "falcon-new_decoder": Case({"num_kv_heads": 2, "alibi": False, "new_decoder_architecture": True}, "falcon"),
    "gemma": Case({"head_dim": 16}),
    "gemma2": Case(MIXED | {"head_dim": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 4}, sliding=(0,)),
    "gemma3_text": Case(MIXED | {"head_dim": 16, "rope_parameters": PER_TYPE}, sliding=(0,)),
    "glm": Case({"head_dim": 16}, interleaved=True),
    "glm4": Case({"head_dim": 16}, interleaved=True),
    "gpt_neox": Case(),
    "gpt_oss": Case(MIXED | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, sliding=(0,)),
    "gptj": Case({"rotary_dim": 4}, interleaved=True),
    "granite": Case({"attention_multiplier": 0.7}),
    "llama": Case(),
    "mistral": Case({"sliding_window": None}),
    "mistral-sliding": Case({"sliding_window": 40}, "mistral"),
    "mixtral": Case({"num_local_experts": 4}),
    "mpt": Case({"max_seq_len": 64}),
    "mpt-clip_qkv": Case(
        {"max_seq_len": 64, "n_heads": 2, "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.5}}, "mpt"
    ),
    "olmo2": Case(),
    "phi": Case(),
    "phi-qk_layernorm": Case({"qk_layernorm": True}, "phi"),
    "phi3": Case({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "qwen2": Case(),
    "qwen2-mixed": Case(MIXED | {"use_sliding_window": True}, "qwen2", sliding=(0,)),
    "qwen2_moe": Case(MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3": Case({"head_dim": 16}),
    "qwen3_moe": Case(MOE | {"head_dim": 16}),
    "smollm3": Case({"no_rope_layers": [1, 0]}, unrotated=(1,)),
    "stablelm": Case(),
    "stablelm-qk_layernorm": Case({"qk_layernorm": True}, "stablelm"),
    "starcoder2": Case(),
}
SCALED = {
    "llama-linear": {"rope_type": "linear", "factor": 4.0},
    "llama-yarn": YARN,
    "llama-llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama-dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama-longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.2, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
    },
}
"""Ways of stretching rotary phases, which every family could have: Llama stands for them."""


def case_of(name):
    return Case({"rope_parameters": THETA | SCALED[name]}, "llama") if name in SCALED else CASES[name]


def tiny_model(name, seed=0, dtype=torch.float64) -> Any:
    """An unconverted model in eval mode, in float64: what is compared is the method, not rounding."""
    case = case_of(name)
    config = AutoConfig.for_model(case.model_type or name, **COMMON | case.settings)
    torch.manual_seed(seed)
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .to(dtype)
        .eval()
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases, norms and learned sinks matter too
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def reference_model(name, window, sinks, distance, first=None, recall=None):
    """A copy of `tiny_model(name)` whose attention is the definition. `first` [B]: where each row's text begins.

    With a `recall` of every query, see `tests.recalling`.

    Its own rotary phases are switched off, so that queries and keys reach the definition raw.
    """
    model, case = tiny_model(name), case_of(name)
    base, config = model.base_model, model.config
    AttentionInterface.register("definition", definition)
    modules = [module for module in base.modules() if type(module).__name__.endswith("Attention")]
    for module in modules:
        slides = module.layer_idx in case.sliding
        rotated = module.layer_idx not in case.unrotated
        module.definition = {
            "window": config.sliding_window if slides else window,
            "sinks": 0 if slides else sinks,
            "distance": distance,
            "first": first,
            "recall": None if slides else recall,
            "interleaved": case.interleaved,
            "frequencies": frequencies(base, slides) if rotated else torch.empty(0),
        }
        if config.model_type == "gptj":
            module.forward = types.MethodType(raw_gptj, module)
        if config.model_type == "falcon":
            module.forward = types.MethodType(raw_falcon, module)
        if config.model_type == "mpt":
            module.forward = types.MethodType(raw_mpt, module)
    if hasattr(base, "rotary_emb"):
        if config.model_type != "falcon":
            model.set_attn_implementation("definition")
        base.rotary_emb = NoRotation(base.rotary_emb)
    return model


def frequencies(base, slides):
    """Radians per token of each pair, from the model's own buffers; none for ALiBi."""
    if hasattr(base, "rotary_emb"):
        buffers = dict(base.rotary_emb.named_buffers())
        per_type = "sliding_attention_inv_freq" if slides else "full_attention_inv_freq"
        return buffers["inv_freq" if "inv_freq" in buffers else per_type].double()
    if base.config.model_type == "gptj":
        sine = base.h[0].attn.embed_positions[1, : base.config.rotary_dim // 2]  # of the phases at position 1
        return sine.double().arcsin()
    return torch.empty(0)


class NoRotation(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = copy.deepcopy(original)

    def forward(self, *args, **kwargs):
        cos, sin = self.original(*args, **kwargs)
        return (cos**2 + sin**2).sqrt(), torch.zeros_like(sin)  # 1, or yarn's attention scaling


def raw_gptj(module, hidden_states, **kwargs):
    states = (getattr(module, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj"))
    query, key, value = (x.view(*x.shape[:2], -1, module.head_dim).transpose(1, 2) for x in states)
    out, _ = definition(module, query, key, value, None, module.head_dim**-0.5)
    return module.out_proj(out.flatten(2)), None


def raw_falcon(module, hidden_states, position_embeddings, **kwargs):
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    if module.new_decoder_architecture:  # keys come once for each query head
        key, value = (x[:, :: module.num_heads // module.num_kv_heads] for x in (key, value))
    yarn = position_embeddings[0].unsqueeze(1)
    out, _ = definition(module, query * yarn, key * yarn, value, None, module.head_dim**-0.5)
    return module.dense(out.flatten(2)), None


def raw_mpt(module, hidden_states, **kwargs):
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, value = (x.view(*x.shape[:2], -1, module.head_dim).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    slopes = 2.0 ** -(8 / module.n_heads * torch.arange(1, module.n_heads + 1))  # ALiBi, for powers of two
    out, _ = definition(module, query, key, value, None, module.softmax_scale, slopes=slopes)
    return module.out_proj(out.flatten(2)), None


def definition(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, slopes=None, **kwargs):
    """Visible iff d < L or j < G; encoded at distance d inside the window, D outside; one softmax. [B, n, H, d].

    What is recalled is visible too, encoded at the distance of recall.
    """
    facts = types.SimpleNamespace(**module.definition)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    count = query.shape[2]
    first = torch.zeros(len(query), dtype=torch.long) if facts.first is None else facts.first
    index = torch.arange(count)
    d = index[:, None] - index
    pairs = len(facts.frequencies)

    def complex_pairs(x):
        x = x[..., : 2 * pairs].double()
        x = x.unflatten(-1, (pairs, 2)) if facts.interleaved else x.unflatten(-1, (2, pairs)).mT
        return torch.complex(x[..., 0], x[..., 1])

    def scores_at(encoded):
        turn = torch.polar(torch.ones(()).double(), encoded.double()[..., None] * facts.frequencies)
        rotated = torch.einsum("bhif,bhjf,ijf->bhij", complex_pairs(query), complex_pairs(key).conj(), turn).real
        scores = scaling * (rotated + query[..., 2 * pairs :] @ key[..., 2 * pairs :].mT)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        return scores if slopes is None else scores - slopes[:, None, None] * encoded

    scores = scores_at(torch.where(d < facts.window, d, facts.distance))
    in_row = (index - first[:, None])[:, None, None, :]
    visible = (d >= 0) & ((d < facts.window) | (in_row < facts.sinks)) & (in_row >= 0)
    visible = visible | (d == 0)  # padding sees itself, and nobody looks at it
    if facts.recall is not None:
        at_distance = scores_at(torch.full_like(d, facts.recall.distance))
        middle = (d >= facts.window) & (in_row >= facts.sinks)
        if facts.recall.block_tokens == 1:
            recalled = best_tokens(at_distance, middle, facts.recall.top_k)
        else:
            turn = torch.polar(torch.ones(()).double(), facts.recall.distance * facts.frequencies.double())

            def plain(turned, rest):
                return torch.cat((turned.real, turned.imag, rest[..., 2 * pairs :].double()), dim=-1)

            far_query, raw_key = plain(complex_pairs(query) * turn, query), plain(complex_pairs(key), key)
            number = (in_row[:, 0, 0] - facts.sinks).div(facts.recall.block_tokens, rounding_mode="floor")
            recalled = best_blocks(scaling * far_query, raw_key, middle, number, facts.recall.top_k, group)
        scores, visible = torch.where(recalled, at_distance, scores), visible | recalled
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., :count]
    return (weights @ value.double()).to(query.dtype).transpose(1, 2).contiguous(), None
