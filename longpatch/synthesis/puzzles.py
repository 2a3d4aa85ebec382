"""Questions whose answers are sentences to be planted in a text: none can be answered from the text itself."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

COLOURS = """
    red blue green yellow white black grey brown golden silver purple orange pink copper ivory scarlet
"""
THINGS = """
    lamp box chair key coat clock kettle ladder basket mirror drum rope saddle trunk violin barrel bell book
    boot bottle broom bucket candle carpet chain crown cup curtain desk door
"""
PEOPLE = """
    Anna Boris Clara David Emma Frank Greta Henry Irene Jacob Karin Louis Maria Nils Olga Peter Rosa Simon Tilda
    Ulrich Vera Walter
"""
TOWNS = """
    Athens Berlin Cairo Dublin Florence Geneva Hamburg Istanbul Kiev Lisbon Madrid Naples Oslo Paris Prague Rome
    Seville Turin Utrecht Venice Vienna Warsaw York Zurich
"""
EVENTS = (
    ("Then a bell rang.", "did a bell ring", "A bell rang"),
    ("Just then a dog barked.", "did a dog bark", "A dog barked"),
    ("Somewhere a door slammed.", "did a door slam", "A door slammed"),
    ("A cock crowed in the yard.", "did a cock crow", "A cock crowed"),
    ("A gun was fired far away.", "was a gun fired", "A gun was fired"),
    ("Then the lights went out.", "did the lights go out", "The lights went out"),
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Puzzle:
    """Sentences to plant, and what to ask about them."""

    kind: str
    sentences: tuple[str, ...]
    question: str
    answer: str


class Supply:
    """Things, people and events of one text, none of which comes twice."""

    def __init__(self, random: Random):
        self.random = random
        self._things = random.sample(
            [f"{colour} {thing}" for colour in COLOURS.split() for thing in THINGS.split()], 400
        )
        self._people = random.sample(PEOPLE.split(), len(PEOPLE.split()))
        self._events = random.sample(EVENTS, len(EVENTS))

    def has(self, kind: str) -> bool:
        left = {"key-value": self._things, "multi-hop": self._people[1:], "counting": self._events}
        return bool(left[kind])

    def key_value(self) -> Puzzle:
        thing, key = self._things.pop(), str(self.random.randrange(10_000, 100_000))
        line = f"The pass key of the {thing} is {key}."
        return Puzzle("key-value", (line,), f"What is the pass key of the {thing}?", line)

    def multi_hop(self) -> Puzzle:
        """A thing, who it was given to, who that one passed it to, and where."""
        thing, town = self._things.pop(), self.random.choice(TOWNS.split())
        first, second = self._people.pop(), self._people.pop()
        lines = (
            f"The {thing} was given to {first}.",
            f"{first} gave everything to {second}.",
            f"{second} lives in {town}.",
        )
        return Puzzle("multi-hop", lines, f"In which town is the {thing}?", f"The {thing} is in {town}.")

    def counting(self) -> Puzzle:
        line, asked, answer = self._events.pop()
        count = self.random.randrange(len(NUMBERS))
        return Puzzle(
            "counting", (line,) * (count + 2), f"How many times {asked}?", f"{answer} {NUMBERS[count]} times."
        )


KINDS: dict[str, Callable[[Supply], Puzzle]] = {
    "key-value": Supply.key_value,
    "multi-hop": Supply.multi_hop,
    "counting": Supply.counting,
}
