"""From files to rows of tokens: sources -> documents -> rows -> batches."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from ..errors import LongpatchError
from .batch import pad_right
from .binary import is_binary, read_binary
from .documents import Encoder
from .rows import Rows, StreamedRows
from .settings import DataSection
from .sources import read_sources

__all__ = ["Rows", "StreamedRows", "load_rows", "pad_right"]


def load_rows(paths: str | Sequence[str], section: DataSection, tokenizer: Any, streaming: bool = False) -> Dataset:
    """Rows `{input_ids, labels}` of `paths`, as `section` asks for.

    Raises:
        LongpatchError: naming the file (and the line) that cannot be read, or when no row is left.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    bos = tokenizer.bos_token_id if section.bos else None
    if section.bos and bos is None:
        raise LongpatchError("load_rows", ["data.bos=true, but the tokenizer has no BOS token"])
    binary = [path for path in paths if is_binary(path)]
    if binary and (len(paths) > 1 or not section.pack):
        raise LongpatchError("load_rows", [f"{binary[0]} is a token file"], "one .bin by itself, with data.pack=true")
    if binary:
        rows = Rows.packed(read_binary(binary[0], tokenizer), None, section.length, section.min_length, bos)
    else:
        encoder = Encoder(tokenizer)
        if streaming:
            return StreamedRows(lambda: map(encoder, read_sources(paths)), section, bos)
        rows = Rows.from_documents(map(encoder, read_sources(paths)), section, bos)
    if not len(rows):
        raise LongpatchError("load_rows", [f"no row of at least {section.min_length} tokens in {', '.join(paths)}"])
    return rows
