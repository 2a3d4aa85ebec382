"""A raw row of a data set becomes a text, or messages with roles."""

from typing import Any

from ..errors import LongpatchError

SUPPORTED = (
    "{text}; {messages: [{role, content}, ...]}; {conversations: [{from, value} or {role, content}, ...]}; "
    "{input or instruction, output}"
)
ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {role: role for role in ROLES} | {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing"), "assistant")

Messages = list[dict[str, str]]


def read_row(place: str, row: dict[str, Any]) -> str | Messages:
    """A text that is trained throughout, or messages of which the answers are.

    An answer that comes before anything was asked is left out, as ShareGPT's rows have it.

    Raises:
        LongpatchError: naming the row's `place` and everything that is wrong with it.
    """
    reasons: list[str] = []
    if "messages" in row:
        read = _turns(row, "messages", reasons)
    elif "conversations" in row:
        read = _turns(row, "conversations", reasons)
    elif "output" in row and ("instruction" in row or "input" in row):
        read = _question(row, reasons)
    elif "text" in row:
        read = row["text"]
        if not isinstance(read, str):
            reasons.append(f"text={_short(read)} must be a string")
    else:
        read, reasons = "", [f"the fields are {', '.join(row) or 'none'}"]
    if reasons:
        raise LongpatchError("data", [f"{place}: {reason}" for reason in reasons], SUPPORTED)
    return read


def _question(row: dict[str, Any], reasons: list[str]) -> Messages:
    """{instruction, input, output} as Alpaca has them, or {input, output}."""
    names = [name for name in ("instruction", "input") if row.get(name) is not None]
    reasons += [
        f"{name}={_short(row[name])} must be a string" for name in (*names, "output") if not isinstance(row[name], str)
    ]
    if reasons:
        return []
    question = "\n\n".join(row[name] for name in names if row[name])
    reasons += [f"{name} is empty" for name, value in (("input", question), ("output", row["output"])) if not value]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _turns(row: dict[str, Any], field: str, reasons: list[str]) -> Messages:
    turns = row[field]
    first = turns[0] if isinstance(turns, list) and turns else None
    if field == "messages" or (isinstance(first, dict) and "role" in first):
        role_name, text_name, roles = "role", "content", {role: role for role in ROLES}
    else:
        role_name, text_name, roles = "from", "value", SPEAKERS
    if first is None:
        reasons.append(f"{field}={_short(turns)} must be a list of {{{role_name}, {text_name}}}")
        return []
    messages = []
    for number, turn in enumerate(turns):
        name = f"{field}[{number}]"
        if not isinstance(turn, dict) or role_name not in turn or text_name not in turn:
            reasons.append(f"{name}={_short(turn)} is not {{{role_name}, {text_name}}}")
            continue
        role, text = turn[role_name], turn[text_name]
        if not isinstance(role, str) or role not in roles:
            reasons.append(f"{name}.{role_name}={_short(role)} must be one of {', '.join(roles)}")
        elif not isinstance(text, str):
            reasons.append(f"{name}.{text_name}={_short(text)} must be a string")
        elif not text and roles[role] == "assistant":
            reasons.append(f"{name}.{text_name} is empty")
        else:
            messages.append({"role": roles[role], "content": text})
    spoken = {message["role"]: place for place, message in reversed(list(enumerate(messages)))}  # first by whom
    asked = spoken.get("user", spoken.get("system", len(messages)))
    messages = [message for place, message in enumerate(messages) if place >= asked or message["role"] != "assistant"]
    if not reasons and not any(message["role"] == "assistant" for message in messages):
        reasons.append(f"{field} holds no answer to learn, or no question before it")
    return messages


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
