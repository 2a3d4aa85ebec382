"""Measure a model on real text. Each evaluation has its own --help."""

KIND = "NAME"
EXAMPLES = """\
examples:
  longpatch eval perplexity demo book.txt --baseline original,fresh:256
  longpatch eval passkey demo --lengths 256,1024 --baseline original,truncate:256
  accelerate launch --num_processes 2 -m longpatch.cli eval passkey MODEL --lengths 8192 --out passkey.jsonl   (GPUs)
  torchrun --nproc-per-node 2 -m longpatch.cli eval passkey demo --lengths 256 --out passkey.jsonl             (CPUs)
"""
COMMANDS = {
    "perplexity": "how well a model reads, by position, in sliding windows, or streamed to any length",
    "passkey": "whether it finds a number hidden in text, by length and depth",
    "needle": "whether it finds a sentence hidden in real text, by length and depth",
    "topic": "whether it names the first topic of a conversation, or a number in one of many lines",
    "qa": "how well it answers questions about long texts",
    "generation": "how close its continuations of real text come to the truth",
    "translation": "how well it translates documents segment by segment",
    "memory": "bytes held and time per token, by length",
    "attention": "entropy and size of attention logits by position, and where hidden states lie",
}
