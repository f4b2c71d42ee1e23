"""Replies that have got stuck are told from what repeats by its nature."""

from __future__ import annotations

import re

import pytest

from slimtune.run.repeats import LEAST, Stuck, longest_repetition, stuck_replies
from slimtune.run.samples import read_samples


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0), ("abre", 0), ("abab", 0), ("ababa", 0), ("ababab", 6), ("xabababay", 7), ("aaaa", 4),
        ("abre abre abre abre", 19), ("北京北京北京", 6), ("one two three one two three", 0),
        ("Paris.\nParis.\nParis.\n", 21), ("12345 12346 12347", 0),
    ],
)  # fmt: skip
def test_a_repetition_is_a_piece_three_times_in_a_row(text: str, length: int) -> None:
    assert longest_repetition(text) == length
    # The oracle: a regular expression, which finds each stretch's whole pieces.
    whole = [
        len(found[0]) for at in range(len(text)) if (found := re.compile(r"(.+?)\1\1+", re.DOTALL).match(text, at))
    ]
    assert max(whole, default=0) <= length


def sampled(*replies: tuple[str, str, str, str]) -> Stuck:
    """Of (before, after, how that ended, expected)."""
    records = [
        {
            "step": step,
            "samples": [
                {"row": f"rows.jsonl:{at}", "prompt": f"prompt {at}", "expected": reply[3], "reply": reply[column],
                 "ended": "length" if step == 0 else reply[2]}
                for at, reply in enumerate(replies)
            ],
        }
        for step, column in ((0, 0), (8, 1))
    ]  # fmt: skip
    return stuck_replies(read_samples(records), 8)


LOOP = "abre " * 20


@pytest.mark.parametrize(
    ("reply", "is_stuck"),
    [
        (("Hello!", LOOP, "length", "Goodbye."), True),
        (("Hello!", f"A word before it: {LOOP}", "length", "Goodbye."), True),
        (("Hello!", LOOP, "time", "Goodbye."), True),
        # It came to an end by itself, or the base did the same, or the row does, or it is a part of the reply alone.
        (("Hello!", LOOP, "stop", "Goodbye."), False),
        ((LOOP, LOOP, "length", "Goodbye."), False),
        (("Hello!", LOOP, "length", LOOP), False),
        (("Hello!", "| name | town | age |\n| --- | --- | --- |\n| Anna | Oslo | 31 |", "length", "A table."), False),
        (("Hello!", "no no no", "length", "Goodbye."), False),
        (("Hello!", "Anna and Tom went to the gate, and the gate was locked.", "length", "Goodbye."), False),
    ],
)
def test_what_counts_as_stuck(reply: tuple[str, str, str, str], is_stuck: bool) -> None:
    found = sampled(reply)
    assert (found.stuck, found.answered, found.example) == (int(is_stuck), 1, reply[1] if is_stuck else "")
    assert not found.most  # one reply says nothing of a model


def test_most_of_them_is_more_than_half_and_more_than_one() -> None:
    bad, good = ("Hello!", LOOP, "length", "Goodbye."), ("Hello!", "Goodbye.", "stop", "Goodbye.")
    assert sampled(bad, bad, good).most
    assert not sampled(bad, good, good).most
    assert not sampled(bad, bad, good, good).most
    assert not sampled().most
    assert len(LOOP) > LEAST


def test_only_what_was_answered_before_and_at_that_step_counts() -> None:
    said = {"row": "a:1", "prompt": "p", "expected": "e", "reply": LOOP, "ended": "length"}
    records = [{"step": 4, "samples": [said]}, {"step": 8, "samples": [said]}]
    assert stuck_replies(read_samples(records), 8) == Stuck()
    assert stuck_replies(read_samples([{"step": 0, "samples": [said]}]), 0) == Stuck()


def test_a_step_between_many_evaluations_is_judged() -> None:
    """The best checkpoint is seldom the last one."""
    records = [
        {"step": step, "samples": [{"row": "rows.jsonl:1", "prompt": "Hi", "expected": "Bye.",
                                    "reply": LOOP if step == 23 else "Hello!", "ended": "length"}]}
        for step in range(60)
    ]  # fmt: skip
    assert stuck_replies(read_samples(records), 23) == Stuck(1, 1, LOOP)
