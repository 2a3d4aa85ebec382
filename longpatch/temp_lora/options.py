"""Settings of Temp-LoRA, validated and frozen."""

from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

from ..errors import LongpatchError

TRAINABLE = ("all", "queries")
# fields of a peft LoraConfig: taken over, and without a meaning for an adapter that lives in memory; others are refused
TAKEN_OVER = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
MEANINGLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)


@dataclass(frozen=True)
class LearnOptions:
    """How a temporary adapter learns; defaults are those of Temp-LoRA (arXiv 2401.11504, section 4).

    Attributes:
        rank, alpha: of the low-rank update `alpha / rank * up @ down` of each target; alpha None = the rank.
        dropout: share of an adapter's inputs set to 0 while learning.
        target_modules: names, or ends of names, of linear layers; None = all of them but the output layer.
        learning_rate: of AdamW (eps 1e-7, no decay), reached after `warmup_steps` optimiser steps, constant from there.
        epochs: optimiser steps on each chunk.
        gradient_checkpointing: compute activations twice and hold fewer of them.
        optimizer_8bit: AdamW of bitsandbytes with 8-bit state.
        trainable: "all" targets, or "queries": query projections only (qTTT, arXiv 2512.13898). Cached keys and values
            then stay exact in the first layer, and nearly so above it, where other queries mean other inputs.
        context_grad: let gradients flow into the context's keys and values; False detaches them, which is faster.
        seed: of the adapters' first weights and of dropout; every row of a batch starts alike.
        peft_config: a peft `LoraConfig` whose rank, alpha, dropout and targets replace those given here; other settings
            of it that differ from peft's defaults are refused.

    Raises:
        LongpatchError: listing every setting that is out of range.
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    learning_rate: float = 5e-5
    warmup_steps: int = 2
    epochs: int = 2
    gradient_checkpointing: bool = False
    optimizer_8bit: bool = False
    trainable: str = "all"
    context_grad: bool = True
    seed: int = 0
    peft_config: Any = None

    def __post_init__(self):
        reasons = []
        if self.peft_config is not None:
            reasons += self._take_over(self.peft_config)
        if isinstance(self.target_modules, list | set | frozenset):
            object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))
        elif isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", (self.target_modules,))
        reasons += integers(self, rank=1, epochs=1, warmup_steps=0)
        for name, low, high in (("dropout", 0, 1), ("alpha", 0, float("inf")), ("learning_rate", 0, float("inf"))):
            value = getattr(self, name)
            if name == "alpha" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value < high:
                reasons.append(f"{name}={value!r} must be a number in [{low}, {high})")
        if self.trainable not in TRAINABLE:
            reasons.append(f"trainable={self.trainable!r} must be one of {', '.join(TRAINABLE)}")
        if self.trainable == "queries" and self.target_modules is not None:
            reasons.append("trainable='queries' chooses the targets itself; leave target_modules out")
        if self.optimizer_8bit and find_spec("bitsandbytes") is None:
            reasons.append("optimizer_8bit=True needs the package bitsandbytes")
        if reasons:
            raise LongpatchError("temp_lora", reasons)

    def _take_over(self, peft_config: Any) -> list[str]:
        given = {"peft_type": getattr(peft_config, "peft_type", None)}
        if getattr(given["peft_type"], "value", given["peft_type"]) != "LORA":
            return [f"peft_config is a {type(peft_config).__name__}, not a LoraConfig"]
        targets = peft_config.target_modules
        object.__setattr__(self, "rank", peft_config.r)
        scale = peft_config.r**0.5 if peft_config.use_rslora else 1
        object.__setattr__(self, "alpha", peft_config.lora_alpha * scale)
        object.__setattr__(self, "dropout", peft_config.lora_dropout)
        object.__setattr__(self, "target_modules", None if targets in (None, "all-linear") else targets)
        object.__setattr__(self, "peft_config", None)
        reasons = []
        for field in fields(peft_config):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(peft_config, field.name)
            if field.name not in (*TAKEN_OVER, *MEANINGLESS) and value != default:
                reasons.append(f"peft_config.{field.name}={value!r}, which a temporary adapter does not do")
        return reasons

    @property
    def scale(self) -> float:
        """What `up @ down` is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for checkpoints and records."""
        return asdict(self) | {"alpha": self.rank if self.alpha is None else self.alpha}

    def replace(self, **changes) -> "LearnOptions":
        return replace(self, **changes)


@dataclass(frozen=True)
class GeneratorOptions:
    """When a generator learns, and what it sees; defaults are those of Temp-LoRA.

    Attributes:
        chunk_tokens: new tokens to write before they are learned.
        context_tokens: tokens before a chunk that it is learned with.
        inference_context_tokens: latest tokens a cache built anew holds, behind the sinks of a converted model; None =
            `context_tokens`.
        learn_prompt: first walk the prompt chunk by chunk, learning.
        cache_reuse_chunks: chunks to keep keys and values for before they are computed anew; None = 1, or for ever with
            `trainable="queries"` on a converted model, whose cache does not grow.
        measure: compute each chunk's perplexity after learning it as well, and that before without dropout: a forward
            or two more.
        progress: show a bar on stderr.

    Raises:
        LongpatchError: listing every setting that is out of range.
    """

    chunk_tokens: int = 1024
    context_tokens: int = 3072
    inference_context_tokens: int | None = None
    learn_prompt: bool = False
    cache_reuse_chunks: int | None = None
    measure: bool = True
    progress: bool = True

    def __post_init__(self):
        reasons = integers(self, chunk_tokens=1, context_tokens=1)
        optional = {
            name: 1 for name in ("inference_context_tokens", "cache_reuse_chunks") if getattr(self, name) is not None
        }
        reasons += integers(self, **optional)
        if reasons:
            raise LongpatchError("TempLoraGenerator", reasons)

    @property
    def inference_context(self) -> int:
        return self.context_tokens if self.inference_context_tokens is None else self.inference_context_tokens


def make_options(kind: Any, options: Any, settings: dict[str, Any], also: Any = None) -> Any:
    """`options` with `settings`, or `kind(**settings)`; unknown names are refused, naming those of `also` too."""
    known = kind.__dataclass_fields__
    unknown = [f"no option {name!r}" for name in settings if name not in known]
    if unknown:
        others = () if also is None else also.__dataclass_fields__
        raise LongpatchError("temp_lora", unknown, ", ".join((*others, *known)))
    if options is None:
        return kind(**settings)
    return options.replace(**settings)


def integers(options: Any, **least: int) -> list[str]:
    """A reason for each named setting that is not an integer of at least the number given."""
    values = {name: getattr(options, name) for name in least}
    return [
        f"{name}={value!r} must be an integer of at least {least[name]}"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < least[name]
    ]
