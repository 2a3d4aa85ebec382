"""Measure a model on real text. Each evaluation has its own --help."""

KIND = "NAME"
EXAMPLES = """\
examples:
  longpatch eval perplexity demo book.txt           original and converted, by position
  longpatch eval temp-lora demo book.txt            with and without learning while reading
"""
COMMANDS = {
    "perplexity": "how well a model reads, by position, in sliding windows, or streamed to any length",
    "temp-lora": "a temporary adapter that learns from what was read, against the same model without it",
}
