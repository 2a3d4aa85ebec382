"""The text that the tour reads."""

from pathlib import Path

from ..errors import LongpatchError


def read_text(path: Path | None) -> tuple[str, str]:
    """Text and its name: the user's file, or prose that every Python installation carries.

    Raises:
        LongpatchError: for a file that is missing, unreadable, empty or binary.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)), "Python's own language reference"
    if not path.is_file():
        raise LongpatchError("--text", [f"no file {path}"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LongpatchError("--text", [f"{path} cannot be read: {error.strerror}"]) from None
    if not data.strip():
        raise LongpatchError("--text", [f"{path} is empty"])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise LongpatchError("--text", [f"{path} is not UTF-8 text"])
    return text, path.name
