"""`TempLoraGenerator`: a model's `generate`, learning from each chunk it writes."""

from collections.abc import Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ..errors import LongpatchError
from .checkpoint import fingerprint, load_state
from .learner import temp_lora
from .options import GeneratorOptions, LearnOptions, make_options
from .run import Run
from .saved import KIND
from .segments import Answer, Segment, generate_segments
from .targets import check_model, find_targets

REFUSED = {
    "assistant_model": "assisted decoding",
    "past_key_values": "a cache of one's own (the generator builds its cache anew as it learns)",
    "inputs_embeds": "inputs_embeds (learning needs token ids)",
    "custom_generate": "custom_generate",
    "cache_implementation": "cache_implementation (the default cache alone can be built anew in place)",
    "negative_prompt_ids": "negative prompts",
}
SUPPORTED = "greedy decoding and sampling from input_ids"
# arguments that a checkpoint cannot hold, so that `resume` has to be given them again
OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "tokenizer")
FREE = ("streamer", "synced_gpus", "return_dict_in_generate")  # `resume` may be given these anew


class TempLoraGenerator:
    """Text generation that learns while it writes (Temp-LoRA, arXiv 2401.11504, algorithm 1)::

        generator = TempLoraGenerator(model, chunk_tokens=1024, context_tokens=3072)
        output = generator.generate(**inputs, max_new_tokens=200_000)

    Every `chunk_tokens` new tokens, a temporary adapter learns them with the text before them as context, and the
    cache is built anew. Each row of a batch has an adapter of its own. Afterwards, however generation ends, the model
    is as it was: base weights are never written to.

    `generate` takes what `model.generate` takes and returns what it returns; greedy decoding and sampling, any number
    of rows. `history` has one dict a chunk: `start` and `stop` in tokens, `loss` of the last epoch in nats,
    `perplexity_before` and `perplexity_after` learning, and seconds to `generate`, `learn` and `rebuild`. With
    `measure=False` the perplexity after is nan, and that before is of learning's own forward, under dropout.

    Args:
        model: any causal language model of transformers: converted by longpatch or not, plain, PEFT or quantised.
        checkpoint_dir: folder to save the whole state to after every chunk; see `resume`.
        settings: fields of `GeneratorOptions` and `LearnOptions`.

    Raises:
        LongpatchError: listing everything that is wrong with the settings.
    """

    def __init__(self, model: Any, *, checkpoint_dir: str | Path | None = None, **settings: Any):
        check_model(model)
        own = {name: settings.pop(name) for name in GeneratorOptions.__dataclass_fields__ if name in settings}
        self.model = model
        self.options: GeneratorOptions = make_options(GeneratorOptions, None, own)
        self.learn_options: LearnOptions = make_options(LearnOptions, None, settings, also=GeneratorOptions)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.history: list[dict[str, float]] = []
        find_targets(self._causal, self.learn_options)

    @property
    def _causal(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """What `model.generate(inputs, generation_config, **kwargs)` returns; one with fields also has `history`.

        Raises:
            LongpatchError: for kinds of generation that have no one line of text to learn from, such as beams.
        """
        return self._generate(inputs, kwargs | {"generation_config": generation_config}, None)

    def generate_segments(self, segments: Iterable[Segment], tokenizer: Any, **settings: Any) -> Iterator[Answer]:
        """Answer segments one after the other, learning each; see `longpatch.temp_lora.segments.generate_segments`.

        Raises:
            LongpatchError: for a generator with settings that segments have no use for: chunks, contexts, checkpoints.
        """
        default = GeneratorOptions(measure=self.options.measure, progress=self.options.progress)
        unused = [name for name, value in vars(default).items() if getattr(self.options, name) != value]
        unused += ["checkpoint_dir"] if self.checkpoint_dir is not None else []
        if unused:
            reasons = [f"{name} was set, which segments have no use for" for name in unused]
            raise LongpatchError("TempLoraGenerator.generate_segments", reasons, ", ".join(vars(self.learn_options)))
        return generate_segments(self.model, tokenizer, segments, learn=self.learn_options, **settings)

    @classmethod
    def resume(cls, checkpoint_dir: str | Path, model: Any, **kwargs: Any) -> Any:
        """Go on from the last chunk saved; returns what the interrupted call of `generate` would have returned.

        Tokens are those of an uninterrupted run, on the same machine and software. Fields such as `scores` hold the
        part since the checkpoint. A streamer gets all the text so far as its prompt.

        Args:
            kwargs: what a checkpoint cannot hold and the interrupted call was given: logits_processor,
                stopping_criteria, prefix_allowed_tokens_fn, tokenizer; a streamer, if one is wanted; and
                return_dict_in_generate, for a result that has the whole run's `history`.

        Raises:
            LongpatchError: for a checkpoint that is damaged, of another model, or for arguments that are missing.
        """
        tensors, data = load_state(Path(checkpoint_dir), KIND, "TempLoraGenerator.resume")
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        reasons = []
        if data["model"] != fingerprint(causal):
            reasons.append(f"the checkpoint in {checkpoint_dir} is of another model, or one converted differently")
        missing = [name for name in data["objects"] if kwargs.get(name) is None]
        reasons += [f"{name} is missing, which the interrupted call was given" for name in missing]
        unknown = [name for name in kwargs if name not in (*OBJECTS, *FREE)]
        reasons += [f"{name} cannot be changed" for name in unknown]
        if reasons:
            raise LongpatchError("TempLoraGenerator.resume", reasons)
        generator = cls(model, checkpoint_dir=checkpoint_dir, **data["options"], **_tuples(data["learn_options"]))
        fields = kwargs.pop("return_dict_in_generate", None)
        settings = data["generation_config"] | ({} if fields is None else {"return_dict_in_generate": fields})
        kwargs["generation_config"] = GenerationConfig.from_dict(settings)
        kwargs["attention_mask"] = tensors["mask"].to(causal.device)
        return generator._generate(tensors["text"].to(causal.device), kwargs, (tensors, data))

    def _generate(self, inputs: Tensor | None, kwargs: dict[str, Any], resumed: tuple[dict, dict] | None) -> Any:
        reasons = [what for name, what in REFUSED.items() if kwargs.get(name) is not None]
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if not isinstance(inputs, Tensor) or inputs.ndim != 2 or not inputs.shape[1]:
            reasons.append("input_ids must be token ids [rows, n], n > 0")
        if reasons:
            raise LongpatchError("TempLoraGenerator.generate", reasons, SUPPORTED)
        config = kwargs.get("generation_config")
        if config is None:
            kwargs["use_cache"] = kwargs.get("use_cache") is not False  # some models say no by default
        elif config.use_cache is None:
            kwargs["generation_config"] = copy(config)
            kwargs["generation_config"].use_cache = True
        objects = [name for name in OBJECTS if kwargs.get(name) is not None]
        with temp_lora(self.model, self.learn_options) as learner:
            run = Run(learner, self.options, self.checkpoint_dir, objects)
            self.history = run.history
            if resumed is not None:
                run.resume_from(*resumed)
            with run.watching():
                output = self.model.generate(inputs, **kwargs)
        if not isinstance(output, Tensor):
            output.history = run.history
        return output


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
