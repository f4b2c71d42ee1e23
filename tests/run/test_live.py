"""A run as it is looked at while it goes: the same as the report's reader finds, whatever the folder goes through."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from slimtune.run.folder import RunFolder
from slimtune.run.history import read_history
from slimtune.run.live import LiveRun
from slimtune.run.live_page import language, page, pieces
from slimtune.run.lock import ask_to_stop, lock_run
from slimtune.run.pages import in_language
from slimtune.run.show import inline_html
from slimtune.run.statement import sentence
from slimtune.run.verdict import advice_text, general_text, verdict_text


def step(number: int, steps: int = 100, **more: Any) -> dict[str, Any]:
    return {"step": number, "steps": steps, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4, "logged_steps": 1,
            "tokens_per_second": 900.0, "memory_bytes": 10**9, "seconds_left": 60.0, **more}  # fmt: skip


def write(file: Path, *records: dict[str, Any], end: str = "\n") -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n".join(json.dumps(record) for record in records) + end)


def looked(run: LiveRun) -> LiveRun:
    run.look()
    return run


def test_a_finished_run_is_what_the_report_reads(finished_run: RunFolder) -> None:
    run = LiveRun(finished_run.path, "finished")
    assert run.look()
    assert not run.look()
    expected = read_history(finished_run.metrics())
    for key in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes"):
        assert run.history.curve(key) == expected.curve(key)
    assert run.history.evaluation_curve() == expected.evaluation_curve()
    assert run.state in ("ended", "worse")
    assert len(run.sampled.prompts) == 3
    assert run.end is None
    facts = finished_run.facts()
    verdict, said = facts["verdict"], pieces([run], "en")["state-0"]
    say = in_language("en")
    told = verdict_text(verdict, facts["training"], say), advice_text(verdict, say), general_text(verdict, say)
    assert all(inline_html(sentence(text)) in said for text in told)
    assert "篇留出的文档上" in pieces([run], "zh")["state-0"]
    run.facts = {**run.facts, "verdict": {**verdict, "start": {}}}
    assert "its files are damaged" in pieces([run], "en")["state-0"]


def test_lines_are_taken_as_they_come_and_a_torn_one_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    run = looked(LiveRun(tmp_path, "run"))
    assert run.state == "stopped"
    with lock_run(tmp_path):
        assert looked(run).state == "preparing"
        write(file, step(1), step(2))
        write(file, step(3), end="")
        assert [point for point, _ in looked(run).history.curve("loss")] == [1, 2]
        assert run.state == "running"
        assert run.end is not None
        write(file, end="\n")
        assert run.look()
        assert not run.look()
        assert [point for point, _ in run.history.curve("loss")] == [1, 2, 3]
        ask_to_stop(tmp_path)
        assert looked(run).state == "stopping"
    assert looked(run).state == "stopped"
    # Killed in the middle of a line, which the resumed session cuts off; it goes on from step 2.
    write(file, step(4), end="")
    run.look()
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    write(file, {"event": "resumed", "step": 2}, step(3), step(4), step(100))
    with lock_run(tmp_path):
        assert [point for point, _ in looked(run).history.curve("loss")] == [1, 2, 3, 4, 100]
        assert run.state == "finishing"


def test_a_folder_that_goes_and_comes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = looked(LiveRun(path, "run"))
    assert run.state == "absent"
    path.mkdir()
    write(path / "metrics.jsonl", step(7))
    assert looked(run).last["step"] == 7
    shutil.rmtree(path)
    assert run.look()
    assert run.state == "gone"
    path.mkdir()  # another run, written over it
    write(path / "metrics.jsonl", step(1))
    assert [point for point, _ in looked(run).history.curve("loss")] == [1]


def test_what_a_guard_found_is_shown_with_its_rows(tmp_path: Path) -> None:
    bad = {"event": "guard", "step": 3, "what": "loss is nan", "rows": ["<i>.jsonl:12", "b.jsonl:7"]}
    write(tmp_path / "metrics.jsonl", step(2, loss=None, loss_text="nan"), bad)
    run = looked(LiveRun(tmp_path, "<run>"))
    assert run.state == "guard"
    shown = pieces([run], "en")
    assert "&lt;i&gt;.jsonl:12" in shown["events-0"]
    assert "<i>" not in "".join(shown.values())
    assert "slimtune resume" in shown["stop-0"]
    assert "&lt;run&gt;" in page([run], "en", "n")


def test_damaged_files_are_no_news(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", step(1))
    (tmp_path / "facts.json").write_text("[", encoding="utf-8")
    (tmp_path / "metrics.jsonl").open("ab").write(b"\xff\xfe{\n[1]\n" + json.dumps(step(2)).encode() + b"\n")
    assert looked(LiveRun(tmp_path, "run")).last["step"] == 2


def test_a_device_in_the_place_of_metrics_is_no_news(tmp_path: Path) -> None:
    """One without an end was read until memory ran out; this one has an end."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    run = LiveRun(tmp_path, "run")
    assert run.look()
    assert (run.state, "no regular file" in run.problem) == ("damaged", True)


def test_values_that_no_run_measured_are_told_and_another_run_is_shown(tmp_path: Path) -> None:
    for name, bad in (("huge", step(10**400)), ("text", step(3, logged_steps="x")), ("sound", step(3))):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "metrics.jsonl", step(5), bad)
    runs = [looked(LiveRun(tmp_path / name, name)) for name in ("huge", "text", "sound")]
    shown = pieces(runs, "en")
    for number in (0, 1):
        assert "its files are damaged" in shown[f"state-{number}"]
        assert "isn&#39;t as slimtune wrote it" in shown[f"state-{number}"]
        assert "its files are damaged" in pieces(runs[number : number + 1], "en")["state-0"]
    assert "svg" in shown["charts"]
    assert "3 / 100" in shown["tiles-2"]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_thousands_of_steps_are_little_to_send(tmp_path: Path, lang: Any) -> None:
    write(tmp_path / "metrics.jsonl", *(step(number, 9000, loss=2 + (number % 7) / 10) for number in range(1, 8000)))
    run = looked(LiveRun(tmp_path, "run"))
    alone, together = pieces([run], lang), pieces([run, run], lang)
    assert len(alone["charts"]) < 150_000
    assert len(together["charts"]) < 150_000
    assert together["charts"].count('class="r1"') >= 5
    assert "7,999 / 9,000" in alone["tiles-0"]


@pytest.mark.parametrize(
    ("wanted", "accepted", "lang"),
    [
        (None, "", "en"), (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"), (None, "de-DE, en;q=0.7, zh;q=0.3", "en"),
        ("zh", "en", "zh"), ("en", "zh", "en"), ("fr", "zh", "zh"), (None, "zhx, enx", "en"),
    ],
)  # fmt: skip
def test_the_language(wanted: str | None, accepted: str, lang: str) -> None:
    assert language(wanted, accepted) == lang
