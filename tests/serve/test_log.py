"""What repeats is written once, and counted."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from slimtune.run.quiet import upstream_to_log
from slimtune.serve import log
from slimtune.serve.log import seldom


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The log's clock. Python's own goes on: an event loop that sees it set back sleeps for as long as that."""
    now = [0.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_what_repeats_is_written_once_and_then_with_its_count(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "log.txt"
    said = logging.getLogger("somebody")
    with upstream_to_log(file), seldom():
        for number in range(1000):
            said.warning("the connection %d broke", number)
        said.warning("something else")
        clock[0] = 61.0
        for _ in range(5):
            said.warning("something else")
        for number in range(1000, 1003):
            said.warning("the connection %d broke", number)
    lines = [line.partition(": ")[2] for line in file.read_text().splitlines()]
    # The same words at another place of the code are another thing.
    assert lines == [
        "the connection 0 broke",
        "something else",
        "something else",
        "the connection 1000 broke",
    ]


def test_the_count_is_said(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "log.txt"
    with upstream_to_log(file), seldom():
        for number in range(2001):
            clock[0] = number / 20
            logging.getLogger("somebody").warning("the connection %d broke", number)
    lines = [line.partition(": ")[2] for line in file.read_text().splitlines()]
    assert lines == ["the connection 0 broke", "the connection 1200 broke (and 1,199 more like this before)"]
