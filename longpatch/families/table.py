"""The families as data: one row each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def every_layer(config: Any) -> list[bool]:
    return [True] * config.num_hidden_layers


def no_layer(config: Any) -> list[bool]:
    return [False] * config.num_hidden_layers


def listed_layers(config: Any) -> list[bool]:
    """SmolLM3: despite its name, the list holds 1 for a layer with rotary phases."""
    return [bool(rotated) for rotated in config.no_rope_layers]


def sliding_layers_only(config: Any) -> list[bool]:
    return [layer_type == "sliding_attention" for layer_type in config.layer_types]


@dataclass(frozen=True)
class Family:
    """What cannot be read off a model's config; all else is.

    Attributes:
        names: what users call the models of this family.
        interleaved: rotary pairs are dimensions (0, 1), (2, 3), ...; otherwise (i, i + rotary_dim / 2), as in Llama.
        rotated_layers: which layers apply rotary phases, from the config.
        slides_whole: a `sliding_window` holds in every layer, whatever `layer_types` says.
        drops_keywords: its layers hand down a mask but no unknown keyword arguments; what layers share takes its place.
        length: config attribute that holds the length trained for, in tokens.
        ends: unconverted, it fails past that length.
        remark: what a user should know.
    """

    names: str
    interleaved: bool = False
    rotated_layers: Callable[[Any], Sequence[bool]] = every_layer
    slides_whole: bool = False
    drops_keywords: bool = False
    length: str = "max_position_embeddings"
    ends: bool = False
    remark: str = ""


MIXED = "sliding layers stay as they are, full ones are converted"
IF_MIXED = "with sliding layers: these stay as they are"

FAMILIES = {
    "cohere": Family("Command R", interleaved=True),
    "cohere2": Family(
        "Command A, Command R7B",
        interleaved=True,
        rotated_layers=sliding_layers_only,
        remark=f"{MIXED}: without phases, as they are trained",
    ),
    "falcon": Family("Falcon", remark="with rotary phases"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2", remark=f"soft-capped scores; {MIXED}"),
    "gemma3_text": Family("Gemma 3, text only", remark=MIXED),
    "glm": Family("GLM-4-9B", interleaved=True),
    "glm4": Family("GLM-4-0414", interleaved=True),
    "gpt_neox": Family("GPT-NeoX, Pythia"),
    "gpt_oss": Family("gpt-oss", remark=f"learned sink logits stay in the softmax; {MIXED}"),
    "gptj": Family("GPT-J", interleaved=True, ends=True, remark="past `n_positions` too"),
    "granite": Family("Granite"),
    "llama": Family("Llama, Yi, SmolLM2, Vicuna, TinyLlama"),
    "mistral": Family("Mistral", slides_whole=True),
    "mixtral": Family("Mixtral", slides_whole=True),
    "mpt": Family(
        "MPT",
        rotated_layers=no_layer,
        length="max_seq_len",
        ends=True,
        remark="ALiBi, capped; past `max_seq_len` too",
    ),
    "olmo2": Family("OLMo 2"),
    "phi": Family("Phi-1, Phi-1.5, Phi-2"),
    "phi3": Family("Phi-3, Phi-4", slides_whole=True),
    "qwen2": Family("Qwen2, Qwen2.5", remark=IF_MIXED),
    "qwen2_moe": Family("Qwen2-MoE", remark=IF_MIXED),
    "qwen3": Family("Qwen3", remark=IF_MIXED),
    "qwen3_moe": Family("Qwen3-MoE", slides_whole=True),
    "smollm3": Family("SmolLM3", rotated_layers=listed_layers, remark="layers without phases stay without them"),
    "stablelm": Family("StableLM", drops_keywords=True),
    "starcoder2": Family("StarCoder2", slides_whole=True),
}

POSITIONS_END = "its learned position embeddings end at the length trained for"
LATENT = "latent attention: every key holds a rotary part shared by all heads"
REFUSED = {
    "bloom": "its attention adds ALiBi to a mask of n x n, inside a forward of its own",
    "codegen": "its attention is computed inside a forward of its own",
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt2": POSITIONS_END,
    "gpt_bigcode": POSITIONS_END,
    "gpt_neo": POSITIONS_END,
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "opt": POSITIONS_END,
}

# Settings, of any family, with which a conversion could not be right: the reason, and when it applies.
REFUSED_SETTINGS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    (
        "attention that looks ahead (`use_bidirectional_attention`, or `is_causal=False`)",
        lambda config: (
            bool(getattr(config, "use_bidirectional_attention", None)) or getattr(config, "is_causal", True) is False
        ),
    ),
    (
        "layers that neither slide nor see everything (`layer_types`)",
        lambda config: bool(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}),
    ),
    (
        "Falcon with `alibi=True`, which adds ALiBi to a mask of n x n",
        lambda config: config.model_type == "falcon" and config.alibi,
    ),
)


def trained_length(config: Any) -> int:
    """The length in tokens that a model was trained for."""
    family = FAMILIES.get(config.model_type)
    return getattr(config, family.length if family else "max_position_embeddings")


def supported_families() -> str:
    return "; ".join(f"{model_type} ({family.names})" for model_type, family in FAMILIES.items())


def reasons_against(config: Any) -> list[str]:
    """Why a model with this config cannot be converted; empty if it can."""
    model_type = config.model_type
    if model_type in FAMILIES:
        return [reason for reason, applies in REFUSED_SETTINGS if applies(config)]
    reason = f"architecture {model_type!r}"
    text = config.get_text_config()
    if model_type in REFUSED:
        reason += f": {REFUSED[model_type]}"
    elif text is not config:
        reason += f": more than text; its text part, {text.model_type!r}, is converted where it is loaded alone"
    return ["encoder-decoder models", reason] if config.is_encoder_decoder else [reason]
