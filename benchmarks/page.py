"""docs/results.md."""

from pathlib import Path


def write_page(results: Path) -> None:
    raise NotImplementedError
