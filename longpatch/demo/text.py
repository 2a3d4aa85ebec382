"""The text that the tour reads."""

from pathlib import Path

from ..errors import LongpatchError


def read_text(path: Path | None) -> tuple[str, str]:
    """Text and its name: the user's file, or prose that every Python installation carries.

    Raises:
        LongpatchError: for a file that is missing, empty or binary.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)), "Python's own language reference"
    if not path.is_file():
        raise LongpatchError("--text", [f"no file {path}"])
    data = path.read_bytes()
    if not data.strip():
        raise LongpatchError("--text", [f"{path} is empty"])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise LongpatchError("--text", [f"{path} is not UTF-8 text"])
    return text, path.name
