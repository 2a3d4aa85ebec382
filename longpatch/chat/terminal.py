"""A conversation in a terminal, or with lines from a pipe."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from transformers import TextStreamer

from ..errors import LongpatchError
from .conversation import Conversation, Reply
from .stopping import interrupts

HELP = """\
/reset        begin anew: nothing said so far is known any more
/save FILE    write the conversation: a .jsonl row that `longpatch train` reads, or text
/exit         leave, as Ctrl-D does
\"\"\"           begins and ends a message of several lines
Ctrl-C        stops an answer"""
BLOCK = '"""'


def run(conversation: Conversation, ask: Callable[[str], str] | None = None, status: TextIO | None = None) -> None:
    """Read messages and commands with `ask(prompt)` until it raises EOFError; `status` gets all but the answers."""
    if ask is None:
        edit_lines()
    ask, shown = ask or input, status or sys.stderr
    while True:
        try:
            line = message(ask)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/exit leaves, /help tells the rest", file=shown)
            continue
        try:
            if line == "/exit":
                return
            if line.startswith("/"):
                command(conversation, line, shown)
            elif line.strip():
                answer(conversation, line, shown)
        except LongpatchError as error:
            print(error, file=shown)


def edit_lines() -> None:
    """Let `input` edit lines, recall earlier ones and take any length: a bare terminal cuts lines at 4,095 bytes."""
    try:
        import readline
    except ImportError:  # Windows has an editor of its own
        return
    readline.parse_and_bind("tab: self-insert")


def message(ask: Callable[[str], str]) -> str:
    line = ask("> ")
    if not line.startswith(BLOCK):
        return line
    lines = [line.removeprefix(BLOCK)]
    while not lines[-1].endswith(BLOCK):
        lines.append(ask("  "))
    lines[-1] = lines[-1].removesuffix(BLOCK)
    return "\n".join(lines).strip("\n")


def answer(conversation: Conversation, text: str, status: TextIO) -> None:
    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with interrupts() as stop:
        reply = conversation.say(text, streamer, stop)
    print(summary(conversation, reply), file=status, flush=True)


def summary(conversation: Conversation, reply: Reply) -> str:
    return (
        f"[{'stopped; ' if reply.stopped else ''}read {reply.read_tokens:,} tokens in {reply.read_seconds:.1f} s, "
        f"wrote {reply.new_tokens:,} in {reply.new_seconds:.1f} s; {conversation.ids.shape[1]:,} in all]"
    )


def command(conversation: Conversation, line: str, status: TextIO) -> None:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        print("[a new conversation]", file=status)
    elif name == "/save" and rest.strip():
        path = Path(rest.strip())
        save(conversation, path)
        print(f"[saved in {path}]", file=status)
    else:
        print(HELP if name == "/help" else f"{line!r} is no command\n{HELP}", file=status)


def save(conversation: Conversation, path: Path) -> None:
    """A row {messages} of all that was answered, appended to a .jsonl file; anything else gets the text."""
    messages = answered(conversation.messages)
    if not messages:
        raise LongpatchError("/save", ["nothing was answered yet"])
    try:
        if path.suffix == ".jsonl":
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        else:
            turns = (f"{turn['role']}: {turn['content']}\n" for turn in conversation.messages)
            path.write_text("\n".join(turns), encoding="utf-8")
    except OSError as error:
        raise LongpatchError("/save", [f"{path}: {error.strerror}"]) from error


def answered(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without turns that got no answer, as training refuses those; empty where there is none."""
    system = [turn for turn in messages if turn["role"] == "system"]
    said = messages[len(system) :]
    pairs = [pair for pair in zip(said[::2], said[1::2], strict=True) if pair[1]["content"].strip()]
    return [*system, *(turn for pair in pairs for turn in pair)] if pairs else []
