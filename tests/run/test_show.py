"""An explanation in a terminal and in Markdown: complete, within its width, and nothing of it taken for markup."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from slimtune.run.explain import explain
from slimtune.run.folder import RunFolder
from slimtune.run.show import inline_html, markdown_table, markdown_text, write_markdown, write_terminal
from slimtune.run.statement import Explanation, Lang, Section, Statement, Table


def terminal(story: Explanation, width: int) -> list[str]:
    out = io.StringIO()
    write_terminal(story, Console(file=out, width=width))
    return out.getvalue().splitlines()


def bare(text: str) -> str:
    return "".join(text.replace("`", "").split())


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("width", [60, 110])
def test_a_terminal_shows_every_statement_within_its_width(finished_run: RunFolder, lang: Lang, width: int) -> None:
    story = explain(finished_run.read_json(finished_run.facts_file), lang)
    lines = terminal(story, width)
    assert max(cell_len(line) for line in lines) <= width
    shown = bare("".join(lines))
    for section in story.sections:
        for statement in section.statements:
            assert bare(statement.text) in shown
    # No line begins with a sign that belongs to the text before it.
    assert not [line for line in lines if line.strip().startswith(tuple("，。、；：）"))]


def test_what_is_broken_is_marked_in_words() -> None:
    story = Explanation(
        "zh", "r", (Section("k", "", "t", (Statement("坏了", "broken"), Statement("没量", "unmeasured"))),)
    )
    lines = "\n".join(terminal(story, 60))
    assert "✗ 不成立：坏了" in lines
    assert "○ 未测量：没量" in lines
    assert "- ✗ **不成立：** 坏了" in write_markdown(story)


def test_text_stays_text() -> None:
    hostile = "[bold]x[/bold] <b>y</b> | *z* `a<b`"
    story = Explanation("en", "r", (Section("k", "", "t", (Statement(hostile),)),))
    assert "[bold]x[/bold] <b>y</b> | *z* a<b" in "\n".join(terminal(story, 80))
    assert inline_html(hostile) == "[bold]x[/bold] &lt;b&gt;y&lt;/b&gt; | *z* <code>a&lt;b</code>"
    row = markdown_table(Table(("a", "b"), ((hostile, "1"),), (1,))).splitlines()[2]
    assert row == r"| \[bold\]x\[/bold\] \<b>y\</b> \| \*z\* `a<b` | 1 |"


def test_an_unpaired_backquote_begins_no_code() -> None:
    assert markdown_text("a ` <b>") == r"a ` \<b>"
    assert markdown_text("`<b>` and ` <b>") == r"`<b>` and ` \<b>"


def test_no_terminal_takes_a_name_for_an_order() -> None:
    facts = {"run": "a\x1b]0;title\x07", "base": None, "adapter": None}
    assert "\x1b" not in explain(facts).run
