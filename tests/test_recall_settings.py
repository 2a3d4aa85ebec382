"""What can be asked of recall, saved, and said on the command line."""

import argparse
import json
import re
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import DynamicCache

from longpatch import LongpatchError, Recall, convert_llama_model, convert_model
from longpatch.cli.flags import add_model_flags, conversion_settings
from longpatch.evaluation.arms import converted_arm, parse_arms
from tests.families import tiny_model
from tests.recalling import SINKS, WINDOW, both_modes, converted
from tests.tiny import random_ids, tiny_llama


def test_settings_are_saved_and_refused(tmp_path):
    recall = Recall(top_k=7, distance=5)
    converted(recall).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["longpatch"]["recall"]["top_k"] == 7
    again = convert_model(type(tiny_llama()).from_pretrained(tmp_path))
    assert again.longpatch.config.recall == recall
    with pytest.raises(LongpatchError, match=r"top_k=0.*storage='tape'.*bits=4"):
        Recall(top_k=0, storage="tape", bits=4)
    for name, value in (("block_tokens", 3), ("max_tokens", 4), ("folder", "x"), ("distance", -1), ("queries", True)):
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(LongpatchError, match=name):
            Recall(**wrong)
    with pytest.raises(LongpatchError, match="block_tokens=16 must be at most local_branch"):
        converted(Recall(block_tokens=16))
    with pytest.raises(LongpatchError, match="none of the model's 2 layers"):
        converted(Recall(from_layer=2))
    with pytest.raises(LongpatchError, match=r"from layer 0 to 1 covers none.*sliding never recall"):
        convert_model(tiny_model("gemma3_text"), WINDOW, SINKS, recall=Recall(to_layer=1))
    for name in ("top_k", "block_tokens"):
        with pytest.raises(LongpatchError, match=f"{name}=None must be an integer"):
            Recall.parse(f"{name}=None,max_tokens=9")
    model = tiny_llama()
    for value in (True, 5, 0, "default", {"top_k": 3}):
        with pytest.raises(LongpatchError, match=re.escape(f"recall={value!r} must be a Recall, False or None")):
            convert_model(model, WINDOW, SINKS, recall=cast(Any, value))
    with pytest.raises(LongpatchError, match="folder=5 must be a path"):
        Recall(storage="disk", folder=cast(Any, 5))
    with pytest.raises(LongpatchError, match=r"recall\.folder=.*missing' is no folder"):
        convert_model(model, WINDOW, SINKS, recall=Recall(storage="disk", folder=tmp_path / "missing"))
    convert_model(model, WINDOW, SINKS, recall=Recall(storage="disk", folder=tmp_path)).save_pretrained(tmp_path)
    assert convert_model(type(model).from_pretrained(tmp_path)).longpatch.config == model.longpatch.config
    model, ids = converted(Recall()), random_ids(2, 30)
    with pytest.raises(LongpatchError, match="needs a memory"):
        model(ids, past_key_values=DynamicCache())
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with pytest.raises(LongpatchError, match="right padding"):
        model(ids, attention_mask=mask)


def test_settings_as_text():
    """What a command line says, and what records and tables call it."""
    recall = Recall.parse("top_k=20,queries=None,storage=disk,folder=/tmp,bits=8")
    assert recall == Recall(top_k=20, queries=None, storage="disk", folder="/tmp", bits=8)
    assert Recall.parse(str(recall)) == recall
    assert (str(Recall()), Recall.parse("default")) == ("default", Recall())
    with pytest.raises(LongpatchError, match=r"'k=3' is not a setting; 'bits' is not a setting.*top_k=\.\.\."):
        Recall.parse("k=3,top_k=2,bits")
    with pytest.raises(LongpatchError, match="top_k='many'"):
        Recall.parse("top_k=many")


@both_modes
@pytest.mark.parametrize(("window", "distance"), [(12, 6), (130, 64)])
@torch.no_grad()
def test_the_default_distance(window, distance, mode):
    """64 tokens, or half the window if that is less."""
    ids = random_ids(1, window + 30)
    default, given, other = (
        convert_llama_model(tiny_llama(), window, SINKS, recall=replace(mode, distance=d))(ids).logits
        for d in (None, distance, distance + 1)
    )
    assert torch.equal(default, given)
    assert (default - other).abs().max() > 1e-3


def test_recall_from_the_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    arguments = parser.parse_args(["--local-branch", "12", "--global-branch", "3", "--recall", "top_k=4,distance=5"])
    model = tiny_llama()
    arm, (baseline,) = converted_arm(model, conversion_settings(arguments)), parse_arms("12/3")
    assert arm.label == "12/3 recall=top_k=4,distance=5"
    with arm.applied(model):
        assert model.longpatch.config.recall == Recall(top_k=4, distance=5)
    with baseline.applied(model):
        assert model.longpatch.config.recall is None
    converted(Recall()).save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    for flags, recall in (([], Recall()), (["--recall", "none"], None)):
        settings = conversion_settings(parser.parse_args(flags))
        assert convert_model(saved, **settings).longpatch.config.recall == recall


def test_a_saved_recall_can_be_left_out(tmp_path):
    converted(Recall(top_k=7)).save_pretrained(tmp_path)
    model = convert_model(type(tiny_llama()).from_pretrained(tmp_path), recall=False)
    assert model.longpatch.config.recall is None
    assert convert_model(model).longpatch.config.recall is None
