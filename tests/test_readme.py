"""What the README shows is what runs."""

import re
from pathlib import Path

import torch

from longpatch_kernels import IMPLEMENTATIONS

ROOT = Path(__file__).parent.parent
KERNELS = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(text):
    found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert found
    return found


def test_the_snippets_run():
    for snippet in snippets(README):
        torch.manual_seed(0)
        names = {}
        exec(compile(snippet, "README.md", "exec"), names)
        if "output" in names:
            assert names["output"].shape[1] > 2 * names["model"].config.max_position_embeddings


def test_the_snippets_about_generating_run(capsys):
    names = {}
    for snippet in snippets((ROOT / "docs" / "generation.md").read_text(encoding="utf-8")):
        exec(compile(snippet, "generation.md", "exec"), names)
    assert "output_attentions=True" in capsys.readouterr().out


def test_the_snippet_about_the_kernels_runs(capsys):
    names = {}
    for snippet in snippets(KERNELS):
        exec(compile(snippet, "kernels.md", "exec"), names)
    assert names["out"].shape == (1, 8, 4096, 64)
    assert names["lse"].shape == (1, 8, 4096)
    assert "auto runs" in capsys.readouterr().out
    assert set(re.findall(r"^\| `(\w+)` \|", KERNELS, flags=re.MULTILINE)) == set(IMPLEMENTATIONS)


def test_the_table_of_options_names_every_kernel():
    (row,) = re.findall(r"^\| `implementation` .*", README, flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {"implementation", *IMPLEMENTATIONS}


def test_the_file_tree_is_the_file_tree():
    """Every path in the annotated tree exists, and every module of the listed folders is in it."""
    tree = re.search(r"```text\n(longpatch/.*?)```", README, flags=re.DOTALL)
    assert tree
    listed: dict[str, set[str]] = {}
    folder = ""
    for line in tree[1].splitlines():
        names = re.match(r"\S+( [\w]+\.py)*", line.strip())[0]
        if line.startswith(" "):
            listed[folder] |= set(names.split())
        else:
            folder = names
            listed[folder] = set()
    for folder, names in listed.items():
        assert (ROOT / folder).is_dir()
        modules = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert not names or names == modules, folder
