"""A conversation reads what is new and nothing twice, and its answers are those to the whole text."""

import inspect
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from longpatch import LongpatchError, convert_model
from longpatch.adapter import load_adapter
from longpatch.chat import Conversation, Sampling
from longpatch.chat.terminal import edit_lines, message, run
from longpatch.cli import main
from longpatch.data import load_rows
from longpatch.data.documents import Encoder
from longpatch.data.settings import DataSection
from longpatch.data.sources import Source
from longpatch.demo import load
from longpatch.temp_lora import LearnOptions, temp_lora
from longpatch.templates import TEMPLATES, find_template, render

OWN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<s>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(params=[False, True], ids=["as it is", "converted"])
def model(request):
    model = load()[0]
    return convert_model(model, 64, 4) if request.param else model


@pytest.fixture
def tokenizer():
    tokenizer = load()[1]
    tokenizer.chat_template = OWN
    return tokenizer


def talk(model, tokenizer, **settings):
    return Conversation(model, tokenizer, sampling=Sampling(new_tokens=8), **settings)


def watched(model):
    """Positions that the model reads, one list a forward."""
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((kwargs["input_ids"] if not args else args[0]).shape[1]),
        with_kwargs=True,
    )
    return read


def test_each_token_is_read_once_and_answers_are_those_to_the_whole_text(model, tokenizer):
    conversation = talk(model, tokenizer)
    read = watched(model)
    said = ["It was a dark night. " * 10, "And then?", "Who came in? " * 5]
    for text in said:
        conversation.say(text)
        assert sum(read) == conversation.ids.shape[1] - 1
    rendered = render(tokenizer, OWN, conversation.messages[:-1], prompt=True)
    written = tokenizer.decode(conversation.ids[0])
    assert written.replace("<s>\n[user]And", "\n[user]And").startswith("[user]It was")
    assert written.count("[assistant]") == 3
    assert rendered.count("[assistant]") == 3
    prompt = conversation.ids[:, : conversation.ids.shape[1] - 8]
    again = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert torch.equal(again, conversation.ids)


def test_the_text_is_what_the_template_makes_of_the_messages(model, tokenizer):
    """An answer that was cut off ends as others do before the next message begins."""
    conversation = talk(model, tokenizer, system="Be brief.")
    for text in ("One.", "Two."):
        conversation.say(text)
    assert tokenizer.decode(conversation.ids[0]) == render(tokenizer, OWN, conversation.messages).removesuffix("<s>\n")
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}


def test_an_end_that_the_model_wrote_is_not_written_again(model, tokenizer):
    conversation = talk(model, tokenizer)
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([0]), 1e4))
    reply = conversation.say("One.")
    hook.remove()
    assert (reply.text, reply.new_tokens) == ("", 1)
    conversation.say("Two.")
    assert "[assistant]<s>\n[user]Two.<s>\n[assistant]" in tokenizer.decode(conversation.ids[0])


def test_a_model_without_a_template_continues_what_is_said(model, tokenizer):
    tokenizer.chat_template = None
    conversation = talk(model, tokenizer)
    first = conversation.say("It was dark.").text
    second = conversation.say("Then?").text
    assert tokenizer.decode(conversation.ids[0]) == f"<s>It was dark.\n{first}<s>Then?\n{second}"


ANSWERED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "Nobody."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still nobody."},
]


@pytest.mark.parametrize("ended", [True, False, "at once"], ids=["ended", "cut off", "ended at once"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_token_by_token_what_training_reads(monkeypatch, template, ended):
    """Whether the model writes the end token or not; "at once": without the space that llama-2 has before it."""
    tokenizer = load()[1]
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|eot_id|>"]})
    encoder = Encoder(tokenizer, template)
    document = encoder((0, Source("", {"messages": ANSWERED})))
    ids, starts = document.ids.tolist(), np.flatnonzero(np.diff(document.trained.astype(int), prepend=0))
    answers = [ids[start:stop] for start, stop in zip(starts[::2], [*starts[1::2], len(ids)][:2], strict=True)]
    assert {answer[-1] for answer in answers} <= encoder.tokens.special
    space = encoder.tokens.plain(" ")[0]
    before = slice(0, -2 if answers[0][-2] == space else -1)
    if ended is not True:
        answers[0] = answers[0][before] + (answers[0][-1:] if ended else [])

    def write(self, streamer, stop):
        self.ids = torch.cat((self.ids, torch.tensor([answers.pop(0)])), dim=1)

    monkeypatch.setattr(Conversation, "_write", write)
    monkeypatch.setattr(Conversation, "_read", lambda self, stop: True)
    conversation = Conversation(SimpleNamespace(device="cpu"), tokenizer, template, system="Be brief.")
    for turn in ANSWERED[1::2]:
        conversation.say(turn["content"])
    if ended == "at once" and before.stop == -2:
        ids.remove(space)
    assert conversation.ids[0].tolist() == ids


def test_reset_forgets(model, tokenizer):
    conversation = talk(model, tokenizer)
    first = conversation.say("One.").text
    conversation.say("Two.")
    conversation.reset()
    assert conversation.messages == []
    assert conversation.say("One.").text == first


def test_a_stop_leaves_a_conversation_that_goes_on(model, tokenizer, monkeypatch):
    monkeypatch.setattr("longpatch.chat.conversation.READ", 16)
    conversation, stop = talk(model, tokenizer), threading.Event()
    count = iter(range(1000))
    hook = model.register_forward_pre_hook(lambda *_: stop.set() if next(count) == 1 else None)
    reply = conversation.say("It was a dark and stormy night. " * 5, stop=stop)
    hook.remove()
    assert reply.stopped
    assert (reply.text, reply.new_tokens) == ("", 0)
    read = watched(model)
    conversation.say("Go on.")
    assert sum(read) == conversation.ids.shape[1] - 1 - 32  # nothing of the first two forwards is read again
    prompt = conversation.ids[:, : conversation.ids.shape[1] - 8]
    again = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert torch.equal(again, conversation.ids)


def test_it_learns_while_it_lasts(model, tokenizer):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    text = "The raven said nevermore to the man of the house. " * 8
    ids = torch.tensor([tokenizer.encode(text)])
    with temp_lora(model, LearnOptions(rank=8, learning_rate=1e-2, dropout=0)) as learner:
        conversation = talk(model, tokenizer, learner=learner, learn_tokens=32)

        def loss():
            with torch.no_grad():
                return model(ids, labels=ids, use_cache=False).loss.item()

        before = loss()
        conversation.say(text)
        assert conversation.learner.steps == 2 * (conversation.ids.shape[1] // 32)
        assert loss() < 0.7 * before
        conversation.reset()
        assert loss() == pytest.approx(before, abs=1e-5)
        conversation.say(text)
        assert loss() < 0.7 * before
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def lines(*given):
    left = list(given)

    def ask(prompt):
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def test_the_terminal(tokenizer, tmp_path, capsys):
    row, text = tmp_path / "chat.jsonl", tmp_path / "chat.txt"
    conversation = talk(load()[0], tokenizer)
    asked = ["Hello.", "", f"/save {row}", f"/save {text}", '"""Two', 'lines."""', "/nonsense", KeyboardInterrupt()]
    run(conversation, lines(*asked, f"/save {tmp_path / 'no' / 'where'}", "/reset", "One.", "/exit", "Never."))
    shown = capsys.readouterr()
    assert json.loads(row.read_text())["messages"][0] == {"role": "user", "content": "Hello."}
    assert text.read_text().startswith("user: Hello.\n\nassistant: ")
    assert "'/nonsense' is no command" in shown.err
    assert "/exit leaves" in shown.err
    assert "No such file" in shown.err
    assert "8 in " in shown.err
    assert [turn["content"] for turn in conversation.messages][::2] == ["One."]
    assert conversation.messages[1]["content"] in shown.out
    assert message(lines('"""', "a", "", 'b"""')) == "a\n\nb"


def test_a_saved_chat_is_a_row_that_trains(tokenizer, tmp_path, capsys):
    """Without turns that were stopped before anything was written."""
    path = tmp_path / "chat.jsonl"
    conversation = talk(load()[0], tokenizer)
    run(conversation, lines(f"/save {path}"))
    assert "nothing was answered yet" in capsys.readouterr().err
    stop = threading.Event()
    stop.set()
    conversation.say("One. " * 50, stop=stop)
    run(conversation, lines(f"/save {path}"))
    assert not path.exists()
    conversation.say("Two.")
    run(conversation, lines(f"/save {path}"))
    (row,) = load_rows(str(path), DataSection(train="", length=100, pack=False), tokenizer)
    answer = conversation.messages[-1]["content"]
    assert tokenizer.decode(row["input_ids"]) == f"[user]Two.<s>\n[assistant]{answer}<s>\n"


def test_a_long_line_is_read_whole_from_a_terminal():
    code = f"{inspect.getsource(edit_lines)}\nedit_lines(); print('read', len(input('> ')), flush=True); input()"
    terminal, inner = os.openpty()
    program = subprocess.Popen([sys.executable, "-c", code], stdin=inner, stdout=inner, stderr=inner)
    shown, typed = b"", b"x" * 10_000 + b"\n"

    def read_until(text):
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], 60)[0], shown[-200:]
            shown += os.read(terminal, 100_000)

    try:
        read_until(b"> ")
        for start in range(0, len(typed), 1000):
            os.write(terminal, typed[start : start + 1000])
            while select.select([terminal], [], [], 0.05)[0]:
                shown += os.read(terminal, 100_000)
        read_until(b"read ")
        read_until(b"read 10000")
    finally:
        program.kill()
        program.wait()
        os.close(terminal)
        os.close(inner)


def test_the_long_chat_of_the_example(tokenizer, tmp_path, capsys, monkeypatch):
    book, saved = tmp_path / "book.txt", tmp_path / "transcript.txt"
    book.write_text("".join(f'Line {number} of """a""" book.\n' for number in range(300)))
    script = Path(__file__).parent.parent / "examples" / "long_chat.py"
    monkeypatch.setattr(
        sys, "argv", [str(script), str(book), "--passages", "2", "--characters", "300", "--save", str(saved)]
    )
    runpy.run_path(str(script), run_name="__main__")
    conversation = Conversation(load()[0], tokenizer, sampling=Sampling(new_tokens=2))
    run(conversation, lines(*capsys.readouterr().out.splitlines()))
    asked = [turn["content"] for turn in conversation.messages if turn["role"] == "user"]
    assert len(asked) == 4
    assert [text.count("Line") > 8 for text in asked] == [True, True, False, False]
    assert saved.read_text().count("user: ") == 4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes what the small model writes."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(load()[0], LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def test_an_adapter_writes_with_the_model(adapter, tmp_path, capsys, monkeypatch):
    tokenizer = load()[1]
    model = load_adapter(load()[0], adapter)
    ids = torch.tensor([tokenizer.encode("It was dark.\n")])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    flags = ["--peft", str(adapter), "--no-convert", "--new-tokens", "8"]
    written = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert main(["generate", "demo", "--prompt", "It was dark.\n", *flags]) == 0
    assert capsys.readouterr().out.strip() == written
    monkeypatch.setattr("builtins.input", lines("It was dark."))
    assert main(["chat", "demo", *flags]) == 0
    assert capsys.readouterr().out.strip() == written
    assert main(["generate", "demo", "--prompt", "It was dark.\n", "--no-convert", "--new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() != written


def test_ctrl_c_stops_the_answer_and_not_the_chat(tokenizer, capsys):
    model = load()[0]
    conversation = Conversation(model, tokenizer, sampling=Sampling(new_tokens=200))
    count = iter(range(1000))
    model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT) if next(count) == 5 else None)
    before = signal.getsignal(signal.SIGINT)
    run(conversation, lines("Hello.", "/exit"))
    assert "[stopped; read" in capsys.readouterr().err
    assert 2 < len(tokenizer.encode(conversation.messages[1]["content"])) < 20
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_program(capsys, monkeypatch):
    def press(text, streamer, stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the program went on")

    monkeypatch.setattr("builtins.input", lines("Hello.", "Never."))
    monkeypatch.setattr(Conversation, "say", lambda self, *given: press(*given))
    before = signal.getsignal(signal.SIGINT)
    assert main(["chat", "demo"]) == 130
    assert capsys.readouterr().err.endswith("longpatch chat: stopped\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_chat_command(tmp_path, capsys, monkeypatch):
    given = lines("It was a dark night.", "/reset", "And then?")
    monkeypatch.setattr("builtins.input", given)
    command = ["chat", "demo", "--local-branch", "64", "--new-tokens", "5", "--temp-lora", "--rank", "2"]
    assert main([*command, "--temperature", "0.8", "--top-p", "0.9", "--learn-tokens", "8"]) == 0
    assert capsys.readouterr().err.count("wrote 5 in") == 2
    assert main(["chat", "demo", "--temperature", "-1"]) == 2
    assert "temperature=-1.0 must be a number from 0 to 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra", [[], ["--temp-lora", "--learn-tokens", "16", "--rank", "2"], ["--chat-template", "vicuna"]]
)
def test_the_generate_command(tmp_path, capsys, extra):
    prompt, out = tmp_path / "prompt.txt", tmp_path / "out.txt"
    prompt.write_text("It was a dark and stormy night, and the rain fell in torrents")
    command = ["generate", "demo", "--prompt-file", str(prompt), "--new-tokens", "40", "--out", str(out), *extra]
    assert main(command) == 0
    shown = capsys.readouterr().out.strip()
    written = out.read_text()
    assert prompt.read_text() in written
    assert shown
    assert written.strip().endswith(shown)
    tokenizer = load()[1]
    assert 30 < len(tokenizer.encode(shown)) < 50
    assert main([*command[:3], str(tmp_path / "none"), *command[4:]]) == 2
    assert "--prompt-file" in capsys.readouterr().err


def test_generate_reads_a_long_prompt_in_parts_and_ends_as_the_template_does(tmp_path, capsys, monkeypatch):
    prompt, out, read = tmp_path / "prompt.txt", tmp_path / "no" / "out.txt", []
    prompt.write_text("It was a dark and stormy night. " * 200)
    command = ["generate", "demo", "--prompt-file", str(prompt), "--new-tokens", "2", "--local-branch", "256"]
    assert main([*command, "--out", str(out)]) == 2
    assert f"--out: no folder {out.parent}" in capsys.readouterr().err
    template = tmp_path / "own.jinja"
    template.write_text(OWN.replace("<s>", "<|im_end|>"))
    arguments = Sampling.arguments

    def watch(self, model, tokenizer, ends):
        read.append((watched(model), [tokenizer.convert_ids_to_tokens(end) for end in ends]))
        return arguments(self, model, tokenizer, ends)

    monkeypatch.setattr(Sampling, "arguments", watch)
    tokenizer = load()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    monkeypatch.setattr("longpatch.cli.generate.open_converted", lambda given: (_wide(load()[0]), tokenizer))
    assert main([*command, "--chat-template", str(template)]) == 0
    ((sizes, ends),) = read
    assert max(sizes) == 1024
    assert sum(sizes) > 2000
    assert ends == ["<|im_end|>"]


def _wide(model):
    model.resize_token_embeddings(len(load()[1]) + 1)
    return model


def test_a_template_without_earlier_answers_is_refused(model, tokenizer):
    tokenizer.chat_template = "{{ messages[-1].content }}"
    conversation = talk(model, tokenizer)
    conversation.say("One.")
    ids = conversation.ids
    with pytest.raises(LongpatchError, match="leaves earlier answers out"):
        conversation.say("Two.")
    assert conversation.ids is ids
    assert find_template(tokenizer) == "{{ messages[-1].content }}"
