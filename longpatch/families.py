"""What differs between model families, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a family keeps the parts that conversion touches, as attribute names on its base model.

    Attributes:
        names: what users call the models of this family.
        rotary: the module that computes rotary phases.
    """

    names: str
    rotary: str = "rotary_emb"


FAMILIES = {
    "llama": Family("Llama, Yi, SmolLM2, Vicuna, TinyLlama"),
}


def supported_families() -> str:
    return "; ".join(f"{model_type} ({family.names})" for model_type, family in FAMILIES.items())
