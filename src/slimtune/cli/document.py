"""A document in Markdown, as the terminal shows it."""

from __future__ import annotations

from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, MarkdownElement, Paragraph, TableElement
from rich.table import Table

from slimtune.cli.page import Prose

__all__ = ["Document"]


class _Whole(TableElement):
    """A table that shows its cells whole: a word wider than its column, as any line of Chinese is one, is broken."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for shown in super().__rich_console__(console, options):
            if isinstance(shown, Table):
                for column in shown.columns:
                    column.overflow = "fold"
            yield shown


class _Lines(Paragraph):
    """A paragraph that is broken as prose."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Prose.assemble(self.text)


class Document(Markdown):
    """Rich's Markdown, which would cut such words off in tables, and leave lines of Chinese half empty."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "table_open": _Whole,
        "paragraph_open": _Lines,
    }
