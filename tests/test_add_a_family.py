"""The steps of docs/add-a-family.md, followed; and the page of all families."""

import re
from pathlib import Path

import pytest

from longpatch import LongpatchError, convert_model
from longpatch.families import FAMILIES, Family
from longpatch.families.page import page
from tests import test_families
from tests.families import CASES, Case, tiny_model

DOCS = Path(__file__).parent.parent / "docs"
CHECKS = [
    test_families.test_equals_the_original_within_the_window,
    test_families.test_follows_the_definition_past_the_window,
    test_families.test_generates_the_same_with_and_without_a_cache,
    test_families.test_gradients_are_those_of_the_definition,
    test_families.test_revert_is_bit_identical,
]


def test_the_page_of_families_is_current():
    assert (DOCS / "families.md").read_text(encoding="utf-8") == page()


def test_the_steps_add_a_family():
    text = (DOCS / "add-a-family.md").read_text(encoding="utf-8")
    test_id, first_row, last_row = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    cases, families = set(CASES), set(FAMILIES)

    def follow(step):
        names = {"CASES": CASES, "FAMILIES": FAMILIES, "Case": Case, "Family": Family}
        exec(compile(step, "add-a-family.md", "exec"), names)

    try:
        follow(test_id)
        name = (CASES.keys() - cases).pop()
        with pytest.raises(LongpatchError, match=f"architecture '{name}'"):
            convert_model(tiny_model(name))
        follow(first_row)
        test_families.test_equals_the_original_within_the_window(name)
        with pytest.raises(AssertionError, match="not close"):
            test_families.test_follows_the_definition_past_the_window(name)
        follow(last_row)
        for check in CHECKS:
            check(name)
        assert f"| `{name}` |" in page()
    finally:
        for name in CASES.keys() - cases:
            del CASES[name]
        for name in FAMILIES.keys() - families:
            del FAMILIES[name]
