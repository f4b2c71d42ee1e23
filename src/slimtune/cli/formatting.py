"""Help and errors at the width of the terminal, in the language that is spoken."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable

import click

from slimtune.language import language
from slimtune.width import cells, folded
from slimtune.words import told

__all__ = ["Context", "TranslatedHelp", "say", "terminal_width"]

_FLAGS_WIDTH = 30
_EXTRA = re.compile(r"(.*?)((?:  \[[^\]]*\])*)", re.DOTALL)
"""A flag's line, and what stands in brackets behind it: defaults, what is required."""


def terminal_width() -> int | None:
    """Columns of the terminal that standard error is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stderr.isatty() else None


def say(text: str, *, err: bool = False) -> None:
    """A line for people: in the language that is spoken, in a terminal broken between words."""
    text = told(text)
    if (sys.stderr if err else sys.stdout).isatty():
        text = "\n".join(folded(text, shutil.get_terminal_size().columns))
    click.echo(text, err=err)


class TranslatedHelp(click.HelpFormatter):
    """Click's help in Chinese. Its own wrapping breaks at spaces alone, which Chinese hasn't."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """The first line."""
        super().write_usage(prog, args, prefix or told("Usage: "))

    def write_heading(self, heading: str) -> None:
        """A title over flags or verbs."""
        self.write(f"{'':{self.current_indent}}{told(heading)}：\n")

    def write_text(self, text: str) -> None:
        """Paragraphs; what begins with \\b keeps its lines."""
        for number, paragraph in enumerate(text.strip().split("\n\n")):
            if number:
                self.write("\n")
            first, _, rest = paragraph.partition("\n")
            if first.strip() == "\b":
                for line in rest.splitlines():
                    left, gap, right = (*re.split(r"(\s{2,})", line.strip(), maxsplit=1), "", "")[:3]
                    self.write(f"{'':{self.current_indent}}{left}{gap}{told(right)}\n")
                continue
            for line in folded(told(" ".join(paragraph.split())), self.width - self.current_indent):
                self.write(f"{'':{self.current_indent}}{line}\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = _FLAGS_WIDTH, col_spacing: int = 2) -> None:
        """Flags or verbs, each with its line."""
        rows = list(rows)
        width = min(max((cells(name) for name, _ in rows), default=0), col_max) + col_spacing
        margin = self.current_indent
        for name, text in rows:
            said, extra = _EXTRA.fullmatch(text).groups()  # type: ignore[union-attr]
            extra = re.sub(r"\[([^\]]*)\]", lambda found: f"[{told(found[1])}]", extra)
            lines = folded(told(said) + extra, max(self.width - margin - width, 10))
            if cells(name) > width - col_spacing:
                self.write(f"{'':{margin}}{name}\n")
            else:
                self.write(f"{'':{margin}}{name}{'':{width - cells(name)}}{lines.pop(0)}\n")
            for line in lines:
                self.write(f"{'':{margin + width}}{line}\n")


class Context(click.Context):
    """A call whose help is in the language that is spoken."""

    def make_formatter(self) -> click.HelpFormatter:
        """Click's own in English."""
        made = super().make_formatter()
        return TranslatedHelp(width=made.width, max_width=self.max_content_width) if language() == "zh" else made
