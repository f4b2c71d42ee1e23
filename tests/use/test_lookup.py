"""Drafts from a reply's own words."""

from __future__ import annotations

from slimtune.use.lookup import Lookup


def test_what_came_after_the_last_tokens_before_is_drafted() -> None:
    assert Lookup().draft([5, 1, 2, 3, 4, 9, 1, 2], 10) == [3, 4, 9]
    assert Lookup().draft([5, 1, 2, 3, 4, 9, 1, 2], 2) == [3, 4]
    assert Lookup().draft([5, 1, 2, 3, 4, 9, 1, 2], 0) == []
    assert Lookup().draft([1, 2, 3, 4, 5], 10) == []
    assert Lookup().draft([7], 10) == []


def test_longer_and_later_places_go_first() -> None:
    assert Lookup().draft([1, 2, 3, 40, 2, 3, 50, 1, 2, 3], 1) == [40]
    assert Lookup().draft([2, 3, 40, 2, 3, 50, 2, 3], 1) == [50]


def test_a_loop_goes_on() -> None:
    assert Lookup().draft([9, 1, 2, 1, 2, 1, 2], 3) == [1, 2, 1]


def test_drafts_grow_while_they_hold() -> None:
    lookup, history = Lookup(), [1, 2] * 40
    sizes = []
    for held in (3, 6, 12, 15, 0, 3):
        draft = lookup.draft(history, 100)
        sizes.append(len(draft))
        lookup.learn(len(draft), held)
        history += draft[:held]
    assert sizes == [3, 6, 12, 15, 15, 3]
    lookup.learn(0, 0)  # no draft teaches nothing
    assert len(lookup.draft(history, 100)) == 6
