"""The page of all families, made from the table: `python -m longpatch.families.page > docs/families.md`."""

from .table import FAMILIES, REFUSED, REFUSED_SETTINGS, Family, no_layer

HEAD = """\
# Families

Made by `python -m longpatch.families.page > docs/families.md`; a test compares. How to add one: [a row and a test
id](add-a-family.md). Every family is tested against its original up to the window and against the dense definition past
it, generating with and without a cache, with gradients, and reverted bit for bit (`tests/test_families.py`).

| models | `model_type` | rotary pairs | |
|---|---|---|---|
"""
REFUSED_HEAD = """
## Refused

What is not listed above is refused by name. These with a reason of their own:

| `model_type` | because |
|---|---|
| models of more than text | images and sounds are not causal; the text part is converted where it is loaded alone |
"""
SETTINGS_HEAD = """
Settings with which a conversion could not be right are refused too:

"""
INTERLEAVED, HALVES, NONE = "(0, 1), (2, 3), ...", "(i, i + half)", "none"


def page() -> str:
    """The text of docs/families.md."""
    supported = [
        f"| {family.names} | `{model_type}` | {_pairs(family)} | {_remark(family)} |\n"
        for model_type, family in FAMILIES.items()
    ]
    refused = [f"| `{model_type}` | {reason} |\n" for model_type, reason in REFUSED.items()]
    settings = [f"- {reason}\n" for reason, _ in REFUSED_SETTINGS]
    return "".join([HEAD, *supported, REFUSED_HEAD, *refused, SETTINGS_HEAD, *settings])


def _pairs(family: Family) -> str:
    if family.rotated_layers is no_layer:
        return NONE
    return INTERLEAVED if family.interleaved else HALVES


def _remark(family: Family) -> str:
    return "with a sliding window: converted to at most that" if family.slides_whole else family.remark


if __name__ == "__main__":
    print(page(), end="")
