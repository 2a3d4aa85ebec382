"""Training on quantised weights: what is held in 4 or 8 bits stays as it is, and what was asked for learns."""

import pytest
import torch

from longpatch.finetune import read_config, train
from longpatch.finetune.model import prepare_model
from longpatch.models import load_model
from tests.test_train import WORDS, losses, write_base, write_config

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")

NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}
# model, lora, training; modules that learn in full
CASES = {
    "nf4": ({"quantization": "nf4"}, {"norms": False}, {}, set()),
    "nf4 and more": (
        {"quantization": "nf4"},
        {"norms": True, "embeddings": True},
        {"gradient_checkpointing": True},
        NORMS | {"embed_tokens"},
    ),
    "nf4, bfloat16": ({"quantization": "nf4", "dtype": "bfloat16"}, {"norms": True}, {"bf16": True}, NORMS),
    "int8": ({"quantization": "int8"}, {"norms": True}, {}, NORMS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    write_base(folder)
    return folder


def is_quantised(module, kind):
    """Held in the bits that were asked for; 4-bit ones with scales that are quantised themselves (QLoRA, sec. 3)."""
    if kind == "int8":
        return isinstance(module, bitsandbytes.nn.Linear8bitLt) and module.weight.dtype == torch.int8
    state = module.weight.quant_state
    return (
        isinstance(module, bitsandbytes.nn.Linear4bit)
        and module.weight.numel() * 2 == module.in_features * module.out_features
        and state.quant_type == "nf4"
        and state.nested
        and state.absmax.dtype == torch.uint8
    )


@pytest.mark.parametrize("case", CASES)
def test_the_base_stays_in_its_bits_and_the_rest_learns(case, folder, monkeypatch):
    section, lora, training, full = CASES[case]
    held, before, with_gradient = [], {}, set()

    def prepared(config):
        model, tokenizer = prepare_model(config)
        held.append(model)
        before.update({name: parameter.data.clone() for name, parameter in model.named_parameters()})
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, name=name: with_gradient.add(name) if parameter.grad.any() else None
                )
        return model, tokenizer

    monkeypatch.setattr("longpatch.finetune.run.prepare_model", prepared)
    training = training | {"save_strategy": "no"}
    config = read_config(write_config(folder, case, steps=4, model=section, lora=lora, training=training))
    output = train(config)
    (model,) = held
    bases = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    assert len(bases) == 14
    assert all(is_quantised(base, section["quantization"]) for base in bases)
    learned = {name for name in before if ".lora_" in name or ".modules_to_save." in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in learned if ".lora_" not in name} == full
    assert with_gradient == learned
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, before[name]) == (name not in learned), name
    curve = losses(output)
    assert curve[-1] < curve[0] - 0.3
    trained, tokenizer = load_model(str(output), quantization=section["quantization"])
    plain, _ = load_model(str(folder / "base"), quantization=section["quantization"])
    ids = torch.tensor([tokenizer.encode(WORDS * 4)[:96]])
    with torch.no_grad():
        assert trained(input_ids=ids, labels=ids).loss < plain(input_ids=ids, labels=ids).loss - 0.3
