"""Lines on the screen: broken between words in a terminal, whole elsewhere, and text is never markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slimtune.run.screen import Screen

TEXT = "134.5 M parameters, 269.0 MB in 16 bits → 111.5 MB as loaded (nf4, bf16): embedding 56.6 MB bf16, [bold]MLP"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_words_stay_whole_and_clear_of_the_label(width: int) -> None:
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, force_terminal=True, color_system=None, width=width, soft_wrap=True)
    screen.say("base", TEXT)
    first, *rest = [line.rstrip() for line in out.getvalue().splitlines()]
    assert first.startswith("  base     134.5 M")
    assert all(line.startswith(" " * 11) and len(line) <= width for line in rest)
    assert " ".join([first[11:], *(line.strip() for line in rest)]).split() == TEXT.split()


def test_elsewhere_a_line_is_a_line() -> None:
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, width=40, soft_wrap=True)
    screen.warn(TEXT)
    assert out.getvalue() == f"  warning  {TEXT}\n"


def test_no_name_is_markup_or_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.say("saved", "runs/x[/b] [red]y/adapter")
    screen.warn("runs/\x1b[2J\u202ex is damaged")
    assert capsys.readouterr().err.splitlines() == [
        "  saved    runs/x[/b] [red]y/adapter",
        "  warning  runs/\\x1b[2J\\x202ex is damaged",
    ]
