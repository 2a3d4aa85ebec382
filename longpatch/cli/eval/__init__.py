"""Measure a model on real text. Each evaluation has its own --help."""

KIND = "NAME"
EXAMPLES = """\
examples:
  longpatch eval perplexity demo book.txt           original and converted, by position
"""
COMMANDS = {
    "distance": "does the model use what lies far back",
    "perplexity": "how well a model reads, by position, in sliding windows, or streamed to any length",
}
