"""``slimtune help [TOPIC]``: the documents that come with the package, in the terminal."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path

import click

from slimtune.cli.page import Page
from slimtune.errors import UserError
from slimtune.language import language
from slimtune.width import CHINESE
from slimtune.words import told

__all__ = ["TOPICS", "command"]

# topic: what its line in the list says. Its document is docs/<topic>.md.
TOPICS = {
    "guide": "Which settings: rows, epochs, learning rate, and what to do when it goes wrong.",
    "data": "What data may look like, and how it is proven.",
    "use": "After training: chat, generate, eval, compare, merge, export.",
    "serve": "Serving runs by the OpenAI API.",
    "models": "Which models train, and what the engine computes.",
    "several-gpus": "One run on several GPUs and hosts.",
    "reliability": "Runs that can't be lost: stops, resume, guards.",
    "security": "What slimtune trusts, and the limits that hold.",
    "fuse": "The engine in a script of your own.",
    "glossary": "The words that slimtune uses in a sense of its own.",
}
_WIDEST = 100
_LINK_INSIDE = re.compile(r"\[([^\]]+)\]\((?!https?://)[^)]*\)")
"""A link to another file, which a terminal can't follow."""
_OTHER_LANGUAGE = re.compile(r"^\[(?:中文|English)\]\([^)]*\)\n+", re.MULTILINE)
_WITHIN_CHINESE = re.compile(f"(?<=[{CHINESE}])\n(?=[{CHINESE}])")
"""Where a line of the source ends within a sentence; Markdown makes a space of it."""
_FOR_LESS = {"LESS": "-FRX", "LESSCHARSET": "utf-8"}
"""As git has it: colours as such, no waiting where all of it fits the screen. And Chinese where a locale is named that
isn't installed."""


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [topic for topic in TOPICS if topic.startswith(incomplete)]


@click.command()
@click.argument("topic", required=False, shell_complete=_complete)
def command(topic: str | None) -> None:
    """Show what slimtune's documents say of TOPIC; without one, which there are.

    Of a verb's flags `slimtune VERB --help` tells.
    """
    if topic is None:
        formatter = click.get_current_context().make_formatter()
        with formatter.section("Topics"):
            formatter.write_dl(list(TOPICS.items()))
        more = told("slimtune help TOPIC shows one; slimtune VERB --help tells a verb's flags.")
        click.echo(f"{formatter.getvalue()}\n{more}")
        return
    from slimtune.cli import VERBS

    if topic not in TOPICS:
        if topic in VERBS:
            raise UserError(f"{topic!r} is a verb and no topic", way_out=f"Its flags: slimtune {topic} --help")
        near = difflib.get_close_matches(topic, TOPICS, n=1)
        way_out = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(TOPICS)}."
        raise UserError(f"there is no topic {topic!r}", way_out=way_out)
    from slimtune.cli.document import Document

    page = Page()
    page.width = min(page.width, _WIDEST)
    source = _OTHER_LANGUAGE.sub("", _document(topic).read_text(encoding="utf-8"))
    source = _WITHIN_CHINESE.sub("", source)
    text = Document(_LINK_INSIDE.sub(r"\1", source))
    if page.is_terminal and sys.stdin.isatty():
        os.environ.update({name: value for name, value in _FOR_LESS.items() if name not in os.environ})
        with page.pager(styles=not page.no_color):
            page.print(text)
    else:
        page.print(text)


def _document(topic: str) -> Path:
    """In the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    for folder in (package / "docs", package.parents[1] / "docs"):
        for name in (f"{topic}.zh-CN.md",) * (language() == "zh") + (f"{topic}.md",):
            if (file := folder / name).is_file():
                return file
    raise UserError(f"the document {topic}.md isn't where slimtune is installed", way_out="Install slimtune anew.")
