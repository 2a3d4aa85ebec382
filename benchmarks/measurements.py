"""What docs/results.md shows: each measurement's command, and the figure published for another model beside it."""

from dataclasses import dataclass

ALL_BOOKS = "BOOKS/50031.txt BOOKS/50797.txt BOOKS/51355.txt BOOKS/52654.txt BOOKS/5274.txt"

BY_LENGTH = (
    "Published for another model (LM-Infinite, Llama-2 on ArXiv), perplexity at 2K / 4K / 8K / 16K / 32K: original "
    "3.4 / 3.8 / 8.5e3 / NaN / NaN, converted 4.3 / 3.6 / 3.3 / 4.2 / 6.5."
)
BY_SINKS = (
    "Published for another model (LM-Infinite), NLL at 16K by number of sinks: 0: 6.43, 1: 1.03, 10: 1.02, 100: 1.02, "
    "1000: 1.81, 2000: 4.96."
)


@dataclass(frozen=True)
class Measurement:
    """One command; BOOKS in it stands for the folder of books."""

    name: str
    title: str
    command: str
    text: str = ""
    published: str = ""
    metrics: tuple[str, ...] = ()  # the tables to show; empty means all


MEASUREMENTS = [
    Measurement(
        "demo-length",
        "The small model by length",
        f"longpatch eval perplexity demo {ALL_BOOKS} --local-branch 256 --global-branch 4"
        " --baseline original,fresh:256 --length 8192 --chunk 1024",
        published=BY_LENGTH,
    ),
    Measurement(
        "demo-far",
        "The small model at 256 times its training length",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --baseline original,fresh:256 --length 65536 --chunk 1024",
    ),
    Measurement(
        "smollm2-length",
        "SmolLM2-135M by length",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 2048"
        " --baseline original,fresh:2048 --length 24576 --chunk 1024",
        published=BY_LENGTH,
    ),
    Measurement(
        "smollm2-far",
        "SmolLM2-135M to 65,536 tokens",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 2048 --length 65536 --chunk 1024",
        text="The model as it is was not read this far: its cost grows with the square of the length.",
    ),
    Measurement(
        "demo-stream",
        "Two million tokens in one stream",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --length 210001 --repeat 10 --bucket 210000 --chunk 1024",
        text="The same 210,000 tokens ten times over, in one stream: every line of the table is the same text.",
    ),
    Measurement(
        "demo-sinks",
        "NLL by number of sinks, small model",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --baseline 256/0,256/1,256/10,256/64,256/128,256/255 --length 4096 --chunk 1024",
        published=BY_SINKS,
    ),
    Measurement(
        "smollm2-sinks",
        "NLL by number of sinks, SmolLM2-135M",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 1024"
        " --baseline 1024/0,1024/1,1024/4,1024/100,1024/512,1024/1000 --length 8192 --chunk 1024",
        published=BY_SINKS,
    ),
]
