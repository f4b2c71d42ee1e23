"""An explanation in a terminal, in Markdown and in HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from slimtune.run.statement import Bar, Explanation, Lang, Section, Statement, Status, Table
from slimtune.width import breaks

__all__ = [
    "MARKS",
    "colon",
    "inline_html",
    "markdown_table",
    "markdown_text",
    "piece_names",
    "verdict",
    "verdict_word",
    "write_markdown",
    "write_terminal",
]

MARKS: dict[Status, str] = {"told": " ", "proved": "✓", "broken": "✗", "unmeasured": "○"}
_STYLES: dict[Status, str] = {"told": "", "proved": "green", "broken": "bold red", "unmeasured": "yellow"}
_WORDS: dict[Status, tuple[str, str]] = {
    "told": ("", ""),
    "proved": ("proved", "已证实"),
    "broken": ("BROKEN", "不成立"),
    "unmeasured": ("not measured", "未测量"),
}
_BAR_WIDTH = 40
_SHADES = ("cyan", "blue", "magenta", "yellow", "white")
_CODE = re.compile(r"`([^`]*)`")


def verdict_word(status: Status, lang: Lang) -> str:
    """The status in a word or two; empty for what is only told."""
    return _WORDS[status][lang == "zh"]


def verdict(explanation: Explanation) -> str:
    """How many statements are proved, broken and not measured, in one line."""
    parts = []
    for status in ("proved", "broken", "unmeasured"):
        if (count := explanation.count(status)) or status == "proved":
            word = verdict_word(status, explanation.lang)
            parts.append(f"{count} 项{word}" if explanation.lang == "zh" else f"{count} {word}")
    return " · ".join(parts)


def colon(lang: Lang) -> str:
    """What stands between a word and what it says."""
    return "：" if lang == "zh" else ": "


def piece_names(bars: Iterable[Bar]) -> list[str]:
    """The names of all the pieces of bars, in the order of their colours."""
    return list(dict.fromkeys(name for bar in bars for name, _ in bar.pieces))


def inline_html(text: str) -> str:
    """A statement's text as HTML: escaped, backquoted pieces as ``<code>``."""
    return _CODE.sub(r"<code>\1</code>", escape(text))


def write_terminal(explanation: Explanation, console: Console) -> None:
    """Print an explanation."""
    console.print(Text.assemble((explanation.run, "bold"), "  ", (verdict(explanation), _verdict_style(explanation))))
    part = ""
    for section in explanation.sections:
        if section.part and section.part != part:
            console.print(Text(f"\n{section.part}", style="bold cyan"))
        part = section.part
        console.print(Text(f"\n{section.title}", style="bold"))
        for statement in section.statements:
            console.print(_statement(statement, explanation.lang, console.width))
        if section.bars:
            console.print(Padding(_bars(section), (1, 0, 0, 2)))
        for table in section.tables:
            console.print(Padding(_table(table), (1, 0, 0, 2)))


def _verdict_style(explanation: Explanation) -> str:
    return _STYLES["broken"] if explanation.count("broken") else "green"


def _statement(statement: Statement, lang: Lang, width: int) -> Text:
    """A mark, and the text beside it, wrapped clear of it."""
    style = _STYLES[statement.status]
    text = _coded(statement.text)
    if statement.status in ("broken", "unmeasured"):
        text = Text.assemble((verdict_word(statement.status, lang) + colon(lang), style), text)
    first, *rest = _wrapped(text, width - 4)
    lines = [Text.assemble((f"  {MARKS[statement.status]} ", style), first), *(Text("    ") + line for line in rest)]
    return Text("\n").join(lines)


def _wrapped(text: Text, width: int) -> list[Text]:
    """Lines of at most ``width`` cells. Rich breaks at spaces only; Chinese has none."""
    lines = list(text.divide(breaks(text.plain, width)))
    for line in lines:
        line.rstrip()
    return lines


def _coded(text: str) -> Text:
    made = Text()
    for number, piece in enumerate(re.split(r"`", text)):
        made.append(piece, style="cyan" if number % 2 else "")
    return made


def _bars(section: Section) -> RichTable:
    longest = max(sum(size for _, size in bar.pieces) for bar in section.bars)
    names = piece_names(section.bars)
    grid = RichTable.grid(padding=(0, 1))
    for bar in section.bars:
        grid.add_row(Text(bar.label, style="dim"), _blocks(bar, longest, names), Text(bar.text))
    if len(names) > 1:
        legend = Text()
        for number, name in enumerate(names):
            legend.append("█ ", style=_SHADES[number % len(_SHADES)]).append(f"{name}  ", style="dim")
        grid.add_row("", legend, "")
    return grid


def _blocks(bar: Bar, longest: float, names: list[str]) -> Text:
    """The bar in character cells; what is there at all is seen, be it small."""
    text = Text()
    for name, size in bar.pieces:
        cells = round(_BAR_WIDTH * size / longest) if longest else 0
        shade = _SHADES[names.index(name) % len(_SHADES)]
        text.append("█" * cells if cells else "▏" * (size > 0), style=shade)
    return text


def _table(table: Table) -> RichTable:
    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for number, name in enumerate(table.header):
        is_number = number in table.numbers
        made.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in table.rows:
        made.add_row(*(_coded(cell) for cell in row))
    return made


def write_markdown(explanation: Explanation, *, level: int = 2) -> str:
    """An explanation as Markdown, its sections under headings of ``level``."""
    blocks: list[str] = []
    for section in explanation.sections:
        title = f"{section.part} · {section.title}" if section.part else section.title
        blocks.append(f"{'#' * level} {title}")
        blocks.append("\n".join(_item(statement, explanation.lang) for statement in section.statements))
        blocks += [markdown_table(table) for table in section.tables]
    return "\n\n".join(blocks) + "\n"


def _item(statement: Statement, lang: Lang) -> str:
    word = verdict_word(statement.status, lang)
    mark = f"{MARKS[statement.status]} " if statement.status != "told" else ""
    said = f"**{word}{colon(lang).strip()}** " if statement.status in ("broken", "unmeasured") else ""
    return f"- {mark}{said}{markdown_text(statement.text)}"


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown."""
    rules = ["---:" if number in table.numbers else "---" for number in range(len(table.header))]
    lines = [table.header, rules, *(tuple(markdown_text(cell) for cell in row) for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: outside of code, its signs are escaped; a bar would end a table's cell."""
    pieces = text.split("`")
    for number, piece in enumerate(pieces):
        if number % 2 and number < len(pieces) - 1:
            continue  # code; a backquote without its partner begins none
        pieces[number] = re.sub(r"([\\*_<\[\]])", r"\\\1", piece)
    return "`".join(pieces).replace("|", r"\|")
