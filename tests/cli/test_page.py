"""Printing for people, when the people leave."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimtune.cli.page import Prose

PRINTS = """
from slimtune.cli.page import Page
page = Page()
for number in range(5000):
    page.print(number)
print("printed by other means")
raise SystemExit(2)
"""


def test_a_reader_that_leaves_changes_no_exit_code() -> None:
    writer = subprocess.Popen([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline() == b"0\n"
    writer.stdout.close()
    assert writer.wait(60) == 2
    assert writer.stderr.read() == b""


def test_what_goes_through_a_pipe_fits_the_terminal_that_it_is_read_in(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    command = [sys.executable, "-c", "from slimtune.cli.page import Page; print(Page().width)"]
    piped = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
    with (file := tmp_path / "file").open("w") as kept:
        subprocess.run(command, stdout=kept, stderr=theirs, check=True)
    os.close(theirs)
    os.close(ours)
    assert (piped.stdout, file.read_text()) == ("60\n", "120\n")


def test_prose_fills_its_lines_in_chinese_and_keeps_its_styles() -> None:
    text = "选定 pack_tokens 640：若按通常的 2,048，本次运行只有 5 个优化器步，不足约 60 步"
    grid = Table.grid()
    grid.add_row(Prose(text, style="bold"))
    out = io.StringIO()
    Console(file=out, width=30, force_terminal=True, color_system="standard").print(grid)
    lines = [Text.from_ansi(line).plain.rstrip() for line in out.getvalue().splitlines()]
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(24 < cell_len(line) <= 30 for line in lines[:-1]), lines
    assert all("\x1b[1m" in line for line in out.getvalue().splitlines())
    assert [line.plain for line in Prose("a/path/that/is/long b").wrap(Console(), 8)] == [
        "a/path/t",
        "hat/is/l",
        "ong",
        "b",
    ]
