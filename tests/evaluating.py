"""What tests of `longpatch eval` share: a text, a conversion, the values of records."""

import json

WINDOW = ["--local-branch", "64", "--global-branch", "4"]
STORY = "The ship went on through the night. The men were silent, and the sea was calm. A light was seen far away. "


def values(records, metric):
    return [record["value"] for record in records if record["metric"] == metric]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
