"""The recipes are valid and carry their sources' values; the launch files are what accelerate and DeepSpeed read."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from longpatch import LongpatchError
from longpatch.finetune import read_config
from longpatch.finetune.run import training_arguments

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = {path.stem: path for path in sorted((EXAMPLES / "recipes").glob("*.yaml"))}

LONGQLORA = {  # arXiv 2311.04879, section 4
    "model.quantization": "nf4",
    "model.attention": "shifted",
    "model.group": 0.25,
    "rope.method": "linear",
    "rope.target_length": 8192,
    "lora.r": 64,
    "lora.alpha": 16,
    "lora.targets": "all-linear",
    "data.length": 8192,
    "training.max_steps": 1000,
    "training.warmup_steps": 20,
    "training.gradient_accumulation_steps": 16,
    "training.optim": "paged_adamw_32bit",
    "training.max_grad_norm": 0.3,
}
SOURCES = {
    "longqlora-pretrain": LONGQLORA | {"training.learning_rate": 2e-4, "data.pack": True},
    "longqlora-sft": LONGQLORA | {"training.learning_rate": 1e-4, "data.pack": False},
    "llama3-80k": {  # arXiv 2404.19553, section 2
        "model.quantization": "nf4",
        "model.attention": "full",
        "rope.theta": 200e6,
        "rope.method": None,
        "lora.r": 32,
        "lora.alpha": 16,
        "lora.targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "lora.embeddings": True,
        "data.length": 80_000,
        "training.learning_rate": 5e-5,
        "training.train_sampling_strategy": "group_by_length",
        "training.gradient_checkpointing": True,
    },
    "alpaca-long": {  # the long-range fork of alpaca_lora_4bit
        "model.quantization": "nf4",
        "model.attention": "full",
        "rope.method": "none",
        "rope.target_length": 6144,
        "lora.r": 32,
        "data.length": 6142,
        "data.min_length": 6142,
        "data.pack": False,
    },
    "smollm2-32k": {"model.name": "smollm2", "rope.target_length": 32_768, "data.length": 32_768},
    "cpu-demo": {
        "model.name": "demo",
        "model.quantization": "nf4",
        "model.attention": "shifted",
        "rope.theta": 80_000.0,
        "rope.target_length": 1024,
        "training.use_cpu": True,
    },
    "offline-demo": {"model.name": "demo", "rope.theta": 80_000.0, "rope.target_length": 1024, "data.length": 1024},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_its_sources_values(name, monkeypatch):
    config = dataclasses.asdict(read_config(RECIPES[name]))
    found = {key: config[key.partition(".")[0]].get(key.partition(".")[2]) for key in SOURCES[name]}
    assert found == SOURCES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_the_trainer_takes_a_recipe(name, tmp_path):
    changes = [f"output={tmp_path}", "training.use_cpu=true", "training.bf16=false", "training.fp16=false"]
    changes.append("model.dtype=float32")
    config = read_config(RECIPES[name], changes)
    arguments = training_arguments(config)
    for key, value in config.training.items():
        assert getattr(arguments, key) == value


def test_changes_and_mistakes_are_named(tmp_path):
    recipe = RECIPES["cpu-demo"]
    config = read_config(recipe, ["data.length=512", "training.save_strategy=no", "training.learning_rate=1e-3"])
    assert config.data.length == 512
    assert (config.training["save_strategy"], config.training["learning_rate"]) == ("no", 1e-3)
    wrong = ["lora.rank=3", "model.attention=sparse", "data.length=1", "training.learning=1", "rope.method=pi"]
    with pytest.raises(LongpatchError) as error:
        read_config(recipe, wrong)
    for part in (
        "lora.rank is unknown",
        "model.attention='sparse'",
        "data.length=1",
        "training.learning",
        "rope.method",
    ):
        assert part in str(error.value)
    with pytest.raises(LongpatchError, match=r"'data.length' changes nothing"):
        read_config(recipe, ["data.length"])
    with pytest.raises(LongpatchError, match=r"data.streaming=true needs training.max_steps"):
        read_config(recipe, ["data.streaming=true", "training.max_steps=-1"])
    alone = ["data.prompt_grad=false", "data.pack=false", "model.attention=full"]
    alone.append("training.per_device_train_batch_size=1")
    read_config(recipe, alone)
    with pytest.raises(LongpatchError, match=r"needs training.per_device_eval_batch_size=1"):
        read_config(recipe, [*alone, "training.per_device_eval_batch_size=2"])
    for change, reason in (
        ("rope={method: linear}", "rope.method='linear' needs a factor or a target_length"),
        ("rope={method: longrope, factor: 4, long_factor: [a]}", r"rope.long_factor=\['a'\]"),
        ("rope={method: yarn, target_length: 512, original_length: 1024}", "rope.target_length=512 is less than"),
        ("rope={factor: 2}", "rope.method or theta is missing"),
    ):
        with pytest.raises(LongpatchError, match=reason):
            read_config(recipe, [change])
    stretched = read_config(recipe, ["rope={method: longrope, target_length: 1024, long_factor: [1, 2.5]}"]).rope
    assert stretched.arguments() == {"method": "longrope", "target_length": 1024, "long_factor": [1, 2.5]}
    for quantization in ("none", "nf4"):
        half = ["model.dtype=bfloat16", f"model.quantization={quantization}"]
        read_config(recipe, [*half, "training.bf16=true"])
        with pytest.raises(LongpatchError, match=r"learn in float32, beside model.dtype='bfloat16' only with training"):
            read_config(recipe, half)
    for method in ("dynamic", "longrope"):
        with pytest.raises(LongpatchError, match=f"caches keys, which rope.method='{method}' outdates"):
            read_config(recipe, [*alone, f"rope={{method: {method}, factor: 4}}"])
    with pytest.raises(LongpatchError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_accelerate_reads_the_fsdp2_file():
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    path = EXAMPLES / "launch" / "fsdp2.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))  # refuses keys it does not know
    assert config.distributed_type == "FSDP"
    known = {f"fsdp_{field.name}" for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    unknown = set(config.fsdp_config) - known - {"fsdp_version", "fsdp_state_dict_type"}
    assert not unknown
    assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_are_whole(stage):
    """accelerate's reading of them; DeepSpeed's own where it is installed."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    path = EXAMPLES / "launch" / f"zero{stage}.json"
    config = HfDeepSpeedConfig(str(path))
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    values = yaml.safe_load(path.read_text())
    filled = json.loads(path.read_text().replace('"auto"', "1"))
    assert [name for name, value in values.items() if value == "auto"] == [
        "gradient_clipping",
        "gradient_accumulation_steps",
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
    ]
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("accelerate reads it; DeepSpeed's own classes, where the package is not installed, do not")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    DeepSpeedZeroConfig(**filled["zero_optimization"])
