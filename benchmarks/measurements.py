"""What docs/results.md shows: each measurement's command, and the figure published for another model beside it."""

from dataclasses import dataclass

ALL_BOOKS = "BOOKS/50031.txt BOOKS/50797.txt BOOKS/51355.txt BOOKS/52654.txt BOOKS/5274.txt"


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
    ),
    Measurement(
        "smollm2-far",
        "SmolLM2-135M to 65,536 tokens",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 2048 --length 65536 --chunk 1024",
    ),
    Measurement(
        "demo-stream",
        "Two million tokens in one stream",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --length 210001 --repeat 10 --bucket 210000 --chunk 1024",
    ),
    Measurement(
        "demo-sinks",
        "NLL by number of sinks, small model",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --baseline 256/0,256/1,256/10,256/64,256/128,256/255 --length 4096 --chunk 1024",
    ),
    Measurement(
        "smollm2-sinks",
        "NLL by number of sinks, SmolLM2-135M",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 1024"
        " --baseline 1024/0,1024/1,1024/4,1024/100,1024/512,1024/1000 --length 8192 --chunk 1024",
    ),
]
