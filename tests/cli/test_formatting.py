"""Help, errors and lines at the terminal's width, in both languages."""

from __future__ import annotations

import importlib

import click
import pytest
from rich.cells import cell_len

from slimtune.cli import VERBS, slimtune_command
from slimtune.cli.formatting import Context
from slimtune.language import spoken
from slimtune.width import folded

ENGLISH = "data runs/a very long name.jsonl can't be read: no such file"
CHINESE = "用 DATA 微调模型（Qwen、Llama 等），并保存适配器；见 slimtune train --help。"


@pytest.mark.parametrize("width", [20, 33, 50])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_lines_break_between_words_and_before_no_closing_sign(text: str, width: int) -> None:
    lines = folded(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(cell_len(line) <= width for line in lines)
    assert not any(line[0] in "，。；、）" or line[-1] in "（" for line in lines)
    words = {word for line in lines for word in line.split()}
    assert words >= {word for word in text.split() if word.isascii()}


def test_what_is_longer_than_a_line_stays_whole() -> None:
    assert folded("see /a/very/long/path/that/somebody/copies now", 10) == [
        "see", "/a/very/long/path/that/somebody/copies", "now"
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_in_chinese_fits_the_terminal(verb: str) -> None:
    command = importlib.import_module(f"slimtune.cli.{verb}").command if verb else slimtune_command
    with spoken("zh"):
        context = Context(
            command, info_name=f"slimtune {verb}", terminal_width=80, parent=click.Context(slimtune_command)
        )
        text = command.get_help(context)
    assert "用法：" in text
    # A flag's own words and choices aren't broken.
    assert [
        line for line in text.splitlines() if cell_len(line) > 80 and not line.lstrip().startswith(("-", "$"))
    ] == []
