"""Metrics as curves: each step once, whatever the file has seen; smoothing that invents nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.run.folder import RunFolder
from slimtune.run.history import read_history, smooth


def session(first: int, last: int, mark: float) -> list[dict[str, Any]]:
    """The records of one session; a resumed one says so before its first step."""
    resumed = [{"event": "resumed", "step": first - 1}] if first > 1 else []
    return resumed + [{"step": step, "loss": mark, "logged_steps": 1} for step in range(first, last + 1)]


def test_a_real_run_is_read_whole(finished_run: RunFolder) -> None:
    history = read_history(finished_run.metrics())
    assert [record["step"] for record in history.steps] == list(range(1, 13))
    assert [record["step"] for record in history.evaluations] == [0, 4, 8, 12]
    assert history.resumed == []


@given(
    ends=st.lists(st.integers(1, 30), min_size=1, max_size=4), kept=st.lists(st.integers(0, 30), min_size=4, max_size=4)
)
def test_of_what_was_trained_twice_the_last_counts(ends: list[int], kept: list[int]) -> None:
    records: list[dict[str, Any]] = []
    expected: dict[int, float] = {}
    resumed = []
    first = 1
    for number, (length, back) in enumerate(zip(ends, kept, strict=False)):
        last = first + length
        records += session(first, last, float(number))
        if number:
            resumed.append(first - 1)
        expected = {step: mark for step, mark in expected.items() if step < first}
        expected |= dict.fromkeys(range(first, last + 1), float(number))
        first = max(1, last - back) + 1
    history = read_history(records)
    assert dict(history.curve("loss")) == expected
    assert [step for step, _ in history.curve("loss")] == sorted(expected)
    assert history.resumed == resumed


def test_an_evaluation_of_discarded_steps_goes_too() -> None:
    records = [*session(1, 4, 0.0), {"step": 4, "eval_loss": 9.0}, *session(3, 6, 1.0), {"step": 6, "eval_loss": 1.0}]
    assert read_history(records).evaluation_curve() == [(6, 1.0)]


def went_on(step: int, *changes: str) -> dict[str, Any]:
    return {"event": "resumed", "step": step, "changes": [{"what": what} for what in changes]}


@pytest.mark.parametrize(
    ("sessions", "held"),
    [
        ([went_on(4, "a", "b"), went_on(8), went_on(8, "c")], [(4, "a"), (4, "b"), (8, "c")]),
        ([went_on(4, "a"), went_on(4)], []),  # it was killed before its next checkpoint, and what had changed put back
        ([went_on(8, "a"), went_on(4, "b")], [(4, "b")]),  # the checkpoint of step 8 was damaged
        ([went_on(4, "a"), {"step": 5, "loss": 1.0}, {"step": 1, "loss": 1.0}], []),  # no checkpoint was left
    ],
)
def test_what_changed_holds_from_the_step_on_that_was_gone_on_from(
    sessions: list[dict[str, Any]], held: list[tuple[int, str]]
) -> None:
    changes = read_history(sessions).changes
    assert [(change["step"], change["what"]) for change in changes] == held


def test_another_number_of_ranks_holds_from_the_step_on_that_was_gone_on_from() -> None:
    def others(step: int, before: int, after: int) -> dict[str, Any]:
        return {"event": "ranks", "step": step, "before": before, "after": after}

    sessions = [went_on(4), others(4, 2, 1), went_on(8), others(8, 1, 3)]
    assert read_history(sessions).on_the_way["ranks"] == sessions[1::2]
    assert read_history([*sessions, went_on(8)]).ranks == sessions[1:2]  # it was killed, and went on as before


def test_events_and_strangers() -> None:
    records = [{"step": 2, "event": "skipped"}, {"loss": 1.0}, {"step": 3, "train_loss": 1.0}, "line"]  # type: ignore[list-item]
    history = read_history(records)  # type: ignore[arg-type]
    assert (len(history.events), history.steps, history.evaluations) == (1, [], [])


def test_a_nonfinite_value_is_a_gap() -> None:
    assert read_history([{"step": 1, "loss": None, "loss_text": "nan"}]).curve("loss") == [(1, None)]


@given(count=st.integers(10, 400), slope=st.floats(-5, 5), start=st.floats(-100, 100), seed=st.integers(0, 99))
def test_smoothing_keeps_a_line_and_its_gaps(count: int, slope: float, start: float, seed: int) -> None:
    draw = random.Random(seed)
    line = [(step, None if draw.random() < 0.2 else start + slope * step) for step in range(count)]
    for (step, value), (same, made) in zip(line, smooth(line), strict=True):
        assert step == same
        assert (value is None) == (made is None)
        assert value is None or made == pytest.approx(value, abs=1e-6)


def test_smoothing_takes_the_noise_away() -> None:
    draw = random.Random(0)
    noisy = [(step, 1.0 + draw.gauss(0, 0.5)) for step in range(1000)]
    assert max(abs(value - 1.0) for _, value in smooth(noisy) if value is not None) < 0.35
    assert max(abs(value - 1.0) for _, value in noisy) > 1.0
    assert smooth(noisy[:9]) == noisy[:9]


def test_a_file_of_nothing_but_resumes_is_read_once() -> None:
    """Walked through again for each of its lines, a file of some megabytes kept every verb that reads it busy."""
    steps, resumes = [{"step": step, "loss": 1.0} for step in range(100_000)], [{"event": "resumed", "step": 10**9}]
    history = read_history([*steps, *resumes * 100_000])
    assert (len(history.steps), len(history.resumed)) == (100_000, 100_000)
