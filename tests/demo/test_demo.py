"""The demo's task: held-out rows are held out, and the checker is strict. That the model learns it, the demo shows."""

from __future__ import annotations

import json

import pytest

from slimtune.demo import HELD_OUT, TRAINING_ROWS, is_right, rows


def test_held_out_rows_share_no_combination_and_no_request_with_training_rows() -> None:
    trained, held_out = rows()
    assert (len(trained), len(held_out)) == (TRAINING_ROWS, HELD_OUT)
    assert not {json.dumps(row.answer) for row in trained} & {json.dumps(row.answer) for row in held_out}
    assert not {row.request for row in trained} & {row.request for row in held_out}
    assert len({row.request for row in trained}) == TRAINING_ROWS


def test_every_word_of_a_held_out_answer_was_seen_in_training() -> None:
    trained, held_out = rows()
    seen = {value for row in trained for value in row.answer.values()}
    assert {value for row in held_out for value in row.answer.values()} <= seen


def test_half_of_the_held_out_wordings_are_new() -> None:
    trained, held_out = rows()
    new = [row for row in held_out if row.request.startswith("Hey, ")]
    assert len(new) == HELD_OUT // 2
    assert not any(row.request.startswith("Hey, ") for row in trained)


ANSWER = {"device": "fan", "room": "attic", "action": "on"}


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ('{"device": "fan", "room": "attic", "action": "on"}', True),
        ('{"room":"attic","action":"on","device":"fan"}', True),
        ('{"device": "fan", "room": "attic", "action": "on"}\n', False),
        ('Sure! {"device": "fan", "room": "attic", "action": "on"}', False),
        ('{"device": "fan", "room": "attic", "action": "on"} Anything else?', False),
        ('{"device": "fan", "room": "attic", "action": "off"}', False),
        ('{"device": "fan", "room": "attic"}', False),
        ("[1]", False),
        ("", False),
    ],
)
def test_right_is_the_whole_reply_and_nothing_else(reply: str, right: bool) -> None:
    assert is_right(reply, ANSWER) is right
