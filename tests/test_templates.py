"""Chat templates by name, against the texts that their models were trained on."""

import pytest

from longpatch import LongpatchError
from longpatch.demo import load
from longpatch.templates import find_template, render

TURNS = [("system", "Be kind."), ("user", " Hi. "), ("assistant", "Hello."), ("user", "Bye.")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
EXPECTED = {
    "vicuna": "<s>Be kind. USER:  Hi.  ASSISTANT: Hello.<s>USER: Bye. ASSISTANT:",
    "llama-2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi. [/INST] Hello. <s><s>[INST] Bye. [/INST]",
    "mistral": "<s>[INST] Be kind.\n\nHi. [/INST] Hello.<s>[INST] Bye. [/INST]",
    "none": "<s>Be kind.\n Hi. \nHello.<s>Bye.\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.fixture
def tokenizer():
    return load()[1]  # BOS and EOS are both <s>


@pytest.mark.parametrize("name", EXPECTED)
def test_by_name(tokenizer, name):
    if name == "llama-3":
        with pytest.raises(LongpatchError, match=r"'llama-3' needs the token <\|eot_id\|>"):
            find_template(tokenizer, name)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    assert render(tokenizer, find_template(tokenizer, name), MESSAGES, prompt=True) == EXPECTED[name]


def test_vicuna_has_a_system_text_of_its_own(tokenizer):
    text = render(tokenizer, find_template(tokenizer, "vicuna"), MESSAGES[1:2], prompt=True)
    assert text.startswith("<s>A chat between a curious user")
    assert text.endswith("answers to the user's questions. USER:  Hi.  ASSISTANT:")


def test_the_tokenizers_own_and_files(tokenizer, tmp_path):
    assert find_template(tokenizer) == find_template(tokenizer, "none")
    tokenizer.chat_template = {"default": "{{ 'd' }}", "tools": "{{ 't' }}"}
    assert [render(tokenizer, find_template(tokenizer, name), MESSAGES) for name in ("auto", "tools")] == ["d", "t"]
    with pytest.raises(LongpatchError, match=r"'nowhere' is no template.*vicuna.*tools, or a Jinja file"):
        find_template(tokenizer, "nowhere")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ raise_exception('no system') }}")
    with pytest.raises(LongpatchError, match="refuses the messages: no system"):
        render(tokenizer, find_template(tokenizer, str(file)), MESSAGES)
    file.write_text("{% if x %}\n{% endfor %}")
    with pytest.raises(LongpatchError, match=r"mine.jinja:2 is no Jinja template"):
        find_template(tokenizer, str(file))
