"""Chat templates by name: the tokenizer's own, five well-known ones, or a Jinja file."""

from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import LongpatchError

CALL = "chat template"
PLACE = "\x00the answer\x00"
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}"
    "{% else %}{% set system, turns = none, messages %}{% endif %}"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = {
    # A question and its answer on lines of their own.
    "none": "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' and eos_token %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}",
    "vicuna": SYSTEM_FIRST + "{{ bos_token }}{{ system or '" + VICUNA_SYSTEM.replace("'", "\\'") + "' }}{{ ' ' }}"
    "{% for m in turns %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% else %}USER: {{ m.content }}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "llama-2": SYSTEM_FIRST
    + "{% for m in turns %}{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {% if loop.first and system %}<<SYS>>{{ '\\n' }}{{ system | trim }}"
    "{{ '\\n' }}<</SYS>>{{ '\\n\\n' }}{% endif %}{{ m.content | trim }} [/INST]{% endif %}{% endfor %}",
    "llama-3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\\n\\n' }}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}",
    "mistral": SYSTEM_FIRST + "{{ bos_token }}{% for m in turns %}"
    "{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}[INST] {% if loop.first and system %}{{ system | trim }}{{ '\\n\\n' }}{% endif %}"
    "{{ m.content | trim }} [/INST]{% endif %}{% endfor %}",
}
MARKERS = {"llama-3": "<|eot_id|>"}  # one token, or the template means nothing to the model


def find_template(tokenizer: Any, name: str = "auto") -> str:
    """The Jinja text of the template called `name`.

    "auto" is the tokenizer's own, or "none" where it has none; else a name of `TEMPLATES`, a name that the tokenizer
    knows, or a file.

    Raises:
        LongpatchError: for a name that is none of these, a file that is no template, or a template made for other
            special tokens.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if name == "auto":
        return named.get("default", TEMPLATES["none"]) if isinstance(own, dict) else own or TEMPLATES["none"]
    if name in named:
        return named[name]
    if name in TEMPLATES:
        marker = MARKERS.get(name)
        if marker is not None and marker not in tokenizer.get_vocab():
            raise LongpatchError(CALL, [f"{name!r} needs the token {marker}, which the tokenizer does not have"])
        return TEMPLATES[name]
    if Path(name).is_file():
        return _read(Path(name))
    raise LongpatchError(
        CALL, [f"{name!r} is no template"], f"auto, {', '.join([*TEMPLATES, *named])}, or a Jinja file"
    )


def render(tokenizer: Any, template: str, messages: list[dict[str, str]], prompt: bool = False) -> str:
    """The text of `messages`; with `prompt`, up to where the next answer begins.

    Raises:
        LongpatchError: where the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise LongpatchError(CALL, [f"the template refuses the messages: {error}"]) from error


def answer_end(tokenizer: Any, template: str) -> str:
    """What the template puts after an answer: its end token, and what may follow before the next message."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACE}]
    _, found, after = render(tokenizer, template, messages).rpartition(PLACE)
    return after if found else ""


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except UnicodeDecodeError as error:
        raise LongpatchError(CALL, [f"{path} is not UTF-8: {error}"]) from error
    except TemplateSyntaxError as error:
        raise LongpatchError(CALL, [f"{path}:{error.lineno} is no Jinja template: {error.message}"]) from error
    return text
