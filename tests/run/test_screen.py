"""What somebody else named or wrote is text on the screen: nothing that Rich or a terminal reads as more."""

from __future__ import annotations

import pytest

from slimtune.run.screen import Screen


def test_no_name_is_markup_or_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.say("saved", "runs/x[/b] [red]y/adapter")
    screen.warn("runs/\x1b[2J\u202ex is damaged")
    assert capsys.readouterr().err.splitlines() == [
        "  saved    runs/x[/b] [red]y/adapter",
        "  warning  runs/\\x1b[2J\\x202ex is damaged",
    ]
