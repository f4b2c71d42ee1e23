"""What is seen while a verb works: one spinner in a terminal, nothing elsewhere, and the cursor comes back."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from slimtune.cli.bar import busy

SCRIPT = """
import os, signal, sys, time
from slimtune.cli.bar import busy
from slimtune.cli.imports import fast_imports
from slimtune.training.stop import StopSignals
with StopSignals() as signals, signals.deferred(), busy("merging"), fast_imports():
    while "again" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
"""
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"


def seen(*words: str) -> tuple[int, str]:
    """The exit code of the script, and what it shows in a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "LANG": "C"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # all of it was read, and it has ended
            break
    os.close(ours)
    return process.wait(30), shown.decode()


@pytest.mark.parametrize(("words", "code"), [((), 0), (("again",), 75)])
def test_one_spinner_at_a_time_and_the_cursor_comes_back(words: tuple[str, ...], code: int) -> None:
    ended, shown = seen(*words)
    assert ended == code, shown
    assert "merging" in shown
    assert "starting" not in shown, "the first is shown"
    assert shown.rfind(SHOWN) > shown.rfind(HIDDEN) >= 0


def test_elsewhere_nothing_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with busy("merging"):
        pass
    assert capsys.readouterr() == ("", "")
