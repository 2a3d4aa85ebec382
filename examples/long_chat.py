"""Messages for a chat that outgrows a model's training length: passages of a book, each with a question.

python examples/long_chat.py BOOK.txt --save converted.txt > messages.txt
longpatch chat smollm2 --local-branch 2048 < messages.txt
"""

import argparse
from pathlib import Path

BLOCK = '"""'
QUESTIONS = (
    "Who is in this passage, and what do they do? Answer in one or two sentences.",
    "What is the mood of this passage? Answer in one or two sentences.",
)
LAST = (
    "Thank you. Now something else: why is the sky blue? Answer in two or three sentences.",
    "Write a short letter to a friend about a walk in the rain.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--characters", type=int, default=5500, help="of a passage (default: 5500, about 1,400 tokens)")
    parser.add_argument("--save", default="transcript.txt", help="where the chat is told to save itself")
    arguments = parser.parse_args()
    text = arguments.book.read_text(encoding="utf-8")
    text = text[len(text) // 10 :]  # past title page and contents
    for number in range(arguments.passages):
        passage = text[number * arguments.characters : (number + 1) * arguments.characters].replace(BLOCK, "")
        question = QUESTIONS[number % len(QUESTIONS)]
        print(f"{BLOCK}Here is a passage of a book.\n\n{passage.strip()}\n\n{question}{BLOCK}")
    for question in LAST:
        print(question)
    print(f"/save {arguments.save}")


if __name__ == "__main__":
    main()
