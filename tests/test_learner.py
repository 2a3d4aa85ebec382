"""The model while it learns: in which numbers, by which attention, with how many logits at one time."""

import pytest
import torch

from longpatch.finetune import read_config, train
from longpatch.finetune.model import prepare_model
from tests.test_train import losses, write_base, write_config
from tests.tiny import random_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learner")
    write_base(folder)
    return folder


ATTENTIONS = {
    "full": {"attention": "full"},
    "shifted": {"attention": "shifted"},
    "lambda": {"attention": "lambda", "local_branch": 16, "global_branch": 2},
}


@pytest.mark.parametrize(
    ("attention", "quantization"), [*((name, "none") for name in ATTENTIONS), ("full", "nf4"), ("full", "int8")]
)
def test_what_learns_beside_16_bits_is_in_float32(attention, quantization, folder):
    """Also embeddings and norms, whose steps 16 bits would round away; between layers there are 16 bits."""
    if quantization != "none":
        pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    config = read_config(
        write_config(
            folder,
            f"{attention}-{quantization}",
            model=ATTENTIONS[attention] | {"dtype": "bfloat16", "quantization": quantization},
            lora={"embeddings": True, "norms": True},
            training={"bf16": True},
        )
    )
    model, _ = prepare_model(config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    resting = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert resting - {torch.uint8, torch.int8} == {torch.bfloat16}
    between = []
    for layer in model.get_base_model().base_model.layers:
        layer.register_forward_hook(lambda module, inputs, output: between.extend([inputs[0].dtype, output.dtype]))
    ids = random_ids(1, 60)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert between == 4 * [torch.bfloat16]
    full = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert len(full) == 6
    assert all(p.grad.any() for p in full)


def test_runs_by_attention_and_with_checkpoints(folder):
    curves = {}
    for name, checkpointing in (("full", False), ("full", True), ("lambda", False)):
        sections = {
            "model": ATTENTIONS[name],
            "lora": {"dropout": 0.0},
            "training": {"gradient_checkpointing": checkpointing, "save_strategy": "no"},
        }
        output = train(read_config(write_config(folder, f"{name}-{checkpointing}", steps=3, **sections)))
        curves[name, checkpointing] = losses(output)
        assert curves[name, checkpointing][-1] < curves[name, checkpointing][0]
    assert curves["full", True] == pytest.approx(curves["full", False], abs=1e-5)
    assert curves["lambda", False][0] != pytest.approx(curves["full", False][0], abs=1e-4)


def test_no_more_logits_than_a_chunk_at_one_time(folder):
    model, _ = prepare_model(read_config(write_config(folder, "chunks")))
    seen, kept = [], []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    ids = random_ids(2, 90)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert (max(seen), sum(seen)) == (48, 2 * 2 * 89)  # model.loss_chunk; forward, and again backward
    weights = {parameter.numel() for parameter in model.parameters()}
    assert max(set(kept) - weights) < 48 * head.out_features
