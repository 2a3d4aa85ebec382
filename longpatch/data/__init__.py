"""From files to rows of tokens: sources -> mixture -> documents -> rows -> batches."""

from typing import Any

from ..errors import LongpatchError
from .batch import pad_right
from .binary import is_binary, read_binary
from .counts import keep, start_counts
from .documents import Encoder, encode
from .mixture import parse_parts, read_mixture
from .rows import Rows, StreamedRows
from .settings import DataSection
from .store import open_store

__all__ = ["DataSection", "Rows", "StreamedRows", "load_rows", "pad_right"]


def load_rows(
    paths: str | list[str] | dict[str, Any], section: DataSection, tokenizer: Any, streaming: bool = False
) -> Rows | StreamedRows:
    """Rows `{input_ids, labels}` of `paths`, as `section` asks for.

    Raises:
        LongpatchError: naming the file (and the line) that cannot be read, or when no row is left.
    """
    parts = parse_parts(paths, section.data_root)
    bos = tokenizer.bos_token_id if section.bos else None
    if section.bos and bos is None:
        raise LongpatchError("data", ["data.bos=true, but the tokenizer has no BOS token"])
    binary = [part for part in parts if is_binary(part.path)]
    if binary:
        if len(parts) > 1 or not section.pack or binary[0].cap is not None or binary[0].weight != 1:
            supported = "one .bin by itself, whole, with data.pack=true"
            raise LongpatchError("data", [f"{binary[0].name} is a token file"], supported)
        tokens = read_binary(binary[0].path, tokenizer)
        rows = Rows.packed(tokens, None, section.length, section.min_length, bos)
    elif streaming:
        encoder, counts = Encoder(tokenizer, section.template), start_counts(parts)

        def documents():
            return keep(encode(read_mixture(parts, section.seed), encoder, section.workers), section, counts)

        return StreamedRows(documents, section, bos, counts)
    else:
        rows = Rows.from_store(open_store(parts, section, tokenizer), section, bos)
    if not len(rows):
        names = ", ".join(part.name for part in parts)
        reasons = [f"no row of at least {section.min_length} tokens in {names}"]
        long = sum(count.long for count in rows.counts)
        if long:
            reasons.append(f"{long:,} conversations have more than length={section.length}")
        raise LongpatchError("data", reasons)
    return rows
