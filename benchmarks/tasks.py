"""Small tasks made by seeded code, each with a score: what defaults.py and rehearse.py beside it train on."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from slimtune.demo import rows as requests_to_a_home

__all__ = ["TASKS", "Pair", "Task", "score"]

Pair = tuple[str, str]
"""What is asked, and the answer."""
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_TEST = 48


@dataclass(frozen=True)
class Task:
    """Rows to train on, and others to be asked afterwards."""

    name: str
    rows: int
    """To train on."""
    pair: Callable[[random.Random], Pair] | None = None
    """Draws one; None: the demo's."""

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        """(to train on, to ask), always the same ones; no question is in both."""
        if self.pair is None:
            trained, held = requests_to_a_home()
            made = [(row.request, json.dumps(row.answer)) for row in (*held, *trained)]
        else:
            draw, made = random.Random(f"slimtune {self.name}"), []
            while len(made) < self.rows + _TEST:
                pair = self.pair(draw)
                if pair not in made:
                    made.append(pair)
        return made[_TEST : _TEST + self.rows], made[:_TEST]


def score(reply: str, answer: str) -> float:
    """Share of the answer's words and numbers that stand at their places in the reply; what is too much counts too."""
    said, right = (re.findall(r"\w+", text) for text in (reply, answer))
    return sum(a == b for a, b in zip(said, right, strict=False)) / max(len(said), len(right))


def _date(draw: random.Random) -> Pair:
    year, month, day = draw.randint(1900, 2030), draw.randint(1, 12), draw.randint(1, 28)
    name = _MONTHS[month - 1]
    written = draw.choice((f"{day} {name} {year}", f"{name} {day}, {year}", f"the {day}. of {name}, {year}"))
    asked = draw.choice(("Write the date: {}", "When was it? {}", "{}, please"))
    return asked.format(written), f"{year}-{month:02}-{day:02}"


_KINDS = {
    "ZAV": ("my parcel hasn't come", "where is the parcel", "the courier never rang", "the box is late again"),
    "KIR": ("I was charged twice", "the invoice is wrong", "my card was refused", "the refund is missing"),
    "MUP": ("I want to send it back", "it doesn't fit me", "it arrived broken", "how do I return the lamp"),
    "TEL": ("thank you so much", "I love the new lamp", "great service", "you made my day"),
}


def _label(draw: random.Random) -> Pair:
    label = draw.choice(sorted(_KINDS))
    before = draw.choice(("Hello,", "Hi there,", "Good morning,", "Dear team,", "Excuse me,", ""))
    behind = draw.choice(("", "Anna", "Regards, Tom", "Please answer soon.", "Bye", "Yours, Lee"))
    return " ".join(f"{before} {draw.choice(_KINDS[label])}. {behind}".split()), label


_NAMES = ("Anna", "Tom", "Lee", "Mia", "Omar", "Ines", "Paul", "Rosa")
_TOWNS = ("Oslo", "Bern", "Lima", "Cork", "Graz", "Nice", "Turin", "Riga")
_GOODS = ("nails", "apples", "candles", "pens", "bricks", "plates", "shirts", "books")


def _order(draw: random.Random) -> Pair:
    name, town, goods, count = draw.choice(_NAMES), draw.choice(_TOWNS), draw.choice(_GOODS), draw.randint(2, 99)
    asked = draw.choice(
        (
            "{name} from {town} wants {count} boxes of {goods}.",
            "Send {count} boxes of {goods} to {name} in {town}.",
            "To {town}, for {name}: {goods}, {count} boxes.",
        )
    )
    return asked.format(name=name, town=town, goods=goods, count=count), f"{count} x {goods} | {town} | {name}"


_WORDS = (
    "apple", "bread", "chair", "door", "engine", "fig", "glass", "house", "ink", "juice", "king", "lemon", "mouse",
    "night", "onion", "pear", "queen", "river", "stone", "table", "uncle", "valley", "window", "yard",
)  # fmt: skip


def _sort(draw: random.Random) -> Pair:
    words = draw.sample(_WORDS, 3)
    return f"Sort: {', '.join(words)}", ", ".join(sorted(words))


TASKS = {
    task.name: task
    for task in (
        Task("home", 120),
        Task("dates", 80, _date),
        Task("labels", 40, _label),
        Task("orders", 60, _order),
        Task("sorting", 150, _sort),
    )
}
