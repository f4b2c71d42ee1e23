"""What the verbs print for people on standard output."""

from __future__ import annotations

import os
import stat
import sys
from typing import Any

from rich.console import Console
from rich.containers import Lines
from rich.text import Text

from slimtune.cli import nobody_reads
from slimtune.width import breaks

__all__ = ["Page", "Prose"]

_WIDTH_OF_FILES = 120


class Page(Console):
    """Standard output. When its reader (head, less) goes away the printing ends, not the command: its exit code counts.

    Rich itself would exit with 1 (rich/console.py, ``Console.on_broken_pipe``).
    """

    def __init__(self) -> None:
        super().__init__(highlight=False)
        if not self.is_terminal:
            self.width = _terminal_behind() or _WIDTH_OF_FILES

    def on_broken_pipe(self) -> None:
        """Print no more."""
        self.quiet = True
        nobody_reads()


class Prose(Text):
    """Text that is broken by :func:`slimtune.width.breaks`, in a table's cell as anywhere: Rich knows no other end of a
    word than a space, and leaves lines of Chinese half empty."""

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        """The lines."""
        made = Lines()
        for line in self.split(allow_blank=True):
            for part in line.divide(breaks(line.plain, width)):
                part.rstrip()
                made.extend(part.wrap(console, width, **options))  # which cuts what is longer than a line
        return made


def _terminal_behind() -> int | None:
    """Columns of the terminal in which a pipe (to less, to head) is likely read: standard error's; None of a file."""
    try:
        piped = stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
        return os.get_terminal_size(sys.stderr.fileno()).columns if piped else None
    except (OSError, ValueError):  # no terminal, or no files at all
        return None
