"""What held-out prompts were answered, as a run's folder tells it."""

from __future__ import annotations

from typing import Any

from slimtune.run.folder import RunFolder
from slimtune.run.samples import MOST_REPLIES, read_samples


def line(step: int, *replies: str, seconds: Any = 1.0) -> dict[str, Any]:
    said = [
        {"row": f"f:{at}", "prompt": f"p{at}", "expected": "e", "reply": text, "ended": "stop"}
        for at, text in enumerate(replies)
    ]
    return {"step": step, "seconds": seconds, "samples": said}


def test_a_real_run_answers_the_same_prompts_before_and_after(finished_run: RunFolder) -> None:
    sampled = read_samples(finished_run.samples())
    assert len(sampled.prompts) == 3
    for asked in sampled.prompts:
        assert [reply.step for reply in (asked.replies[0], asked.replies[-1])] == [0, 12]
    assert sampled.seconds > 0
    assert "What it answered on the way" in finished_run.report_html.read_text("utf-8")
    assert "训练途中的回答" in finished_run.report_html.read_text("utf-8")


def test_a_resumed_session_takes_back_what_came_after() -> None:
    sampled = read_samples([line(0, "a"), line(4, "b"), line(8, "c"), line(4, "d"), line(6, "e")])
    assert [(reply.step, reply.text) for reply in sampled.prompts[0].replies] == [(0, "a"), (4, "d"), (6, "e")]
    assert (sampled.evaluations, sampled.seconds) == (3, 5.0)


def test_of_many_replies_the_first_the_last_and_some_between() -> None:
    sampled = read_samples([line(step, str(step)) for step in range(0, 1000, 3)], MOST_REPLIES)
    steps = [reply.step for reply in sampled.prompts[0].replies]
    assert len(steps) == MOST_REPLIES
    assert (steps[0], steps[-1]) == (0, 999)
    assert steps == sorted(set(steps))


def test_what_no_run_writes_is_passed_over() -> None:
    odd: list[dict[str, Any]] = [{}, {"step": 1}, {"step": "1", "samples": []}, {"step": 1, "samples": [{"row": 3}]}]
    assert read_samples(odd).prompts == []
    assert read_samples([line(1, "a", seconds="x")]).seconds == 0


def test_a_file_of_many_evaluations_is_read_once() -> None:
    """What was read before was copied for each line."""
    assert read_samples([line(step) for step in range(50_000)]).evaluations == 50_000
