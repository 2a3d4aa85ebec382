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
        length: config attribute that holds the length trained for, in tokens.
        drops_keywords: its layers hand down a mask but no unknown keyword arguments; what layers share takes its place.
    """

    names: str
    interleaved: bool = False
    rotated_layers: Callable[[Any], Sequence[bool]] = every_layer
    length: str = "max_position_embeddings"
    drops_keywords: bool = False


FAMILIES = {
    "cohere": Family("Command R", interleaved=True),
    "cohere2": Family("Command A, Command R7B", interleaved=True, rotated_layers=sliding_layers_only),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2"),
    "gemma3_text": Family("Gemma 3 (text)"),
    "glm": Family("GLM-4-9B", interleaved=True),
    "glm4": Family("GLM-4-0414", interleaved=True),
    "gpt_neox": Family("GPT-NeoX, Pythia"),
    "gpt_oss": Family("gpt-oss"),
    "gptj": Family("GPT-J", interleaved=True),
    "granite": Family("Granite"),
    "llama": Family("Llama, Yi, SmolLM2, Vicuna, TinyLlama"),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral"),
    "mpt": Family("MPT", rotated_layers=no_layer, length="max_seq_len"),
    "olmo2": Family("OLMo 2"),
    "phi": Family("Phi-1, Phi-1.5, Phi-2"),
    "phi3": Family("Phi-3, Phi-4"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen2_moe": Family("Qwen2-MoE"),
    "qwen3": Family("Qwen3"),
    "qwen3_moe": Family("Qwen3-MoE"),
    "smollm3": Family("SmolLM3", rotated_layers=listed_layers),
    "stablelm": Family("StableLM", drops_keywords=True),
    "starcoder2": Family("StarCoder2"),
}

REFUSED = {
    "bloom": "its attention adds ALiBi by column of the padded batch, inside a forward of its own",
    "codegen": "its attention is computed inside a forward of its own, with rotary phases from a table that ends",
    "falcon": "its attention is computed inside a forward of its own, in two forms (ALiBi or rotary)",
    "gpt2": "learned position embeddings end at the length trained for",
    "gpt_bigcode": "learned position embeddings end at the length trained for",
    "gpt_neo": "learned position embeddings end at the length trained for",
    "opt": "learned position embeddings end at the length trained for",
    "deepseek_v2": "latent attention keeps a rotary part of its own in every key",
    "deepseek_v3": "latent attention keeps a rotary part of its own in every key",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
}


def supported_families() -> str:
    return "; ".join(f"{model_type} ({family.names})" for model_type, family in FAMILIES.items())


def reasons_against(config: Any) -> list[str]:
    """Why a model with this config cannot be converted; empty if it can."""
    model_type = config.model_type
    if config.is_encoder_decoder:
        return ["encoder-decoder models", f"architecture {model_type!r}"]
    if model_type not in FAMILIES:
        text = config.get_text_config()
        if text is not config:
            return [
                f"architecture {model_type!r}: a multimodal wrapper, whose images would not be causal text; "
                f"its text part is {text.model_type!r}"
            ]
        return [f"architecture {model_type!r}" + (f": {REFUSED[model_type]}" if model_type in REFUSED else "")]
    reasons = []
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        reasons.append("attention that looks ahead (use_bidirectional_attention or is_causal=False)")
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        reasons.append(f"layers of type {', '.join(sorted(unknown))}")
    if model_type == "gptj" and config.rotary_dim is None:
        reasons.append("rotary_dim=None, for which GPT-J has no working form")
    return reasons
