"""What the READMEs and the docs tell people to type exists: verbs, flags, files, Python."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from slimtune.cli import slimtune_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [page for page in PAGES if page.name.endswith(".zh-CN.md")]


def commands(page: Path) -> list[str]:
    """The slimtune lines of a page's console blocks, and those in its tables and text."""
    text = page.read_text(encoding="utf-8")
    typed = re.findall(r"^\$ (slimtune .*)$", text, flags=re.M)
    return typed + list(re.findall(r"`(slimtune [^`\n]+)`", text))


ALL = [(page.name, line) for page in PAGES for line in commands(page)]


def test_the_pages_name_commands() -> None:
    assert len(ALL) > 20


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{page}: {line}" for page, line in ALL])
def test_a_command_parses(page: str, line: str) -> None:
    words = shlex.split(line.split(" > ")[0].split(" #")[0])[1:]
    if words and not words[0].startswith("-"):
        verb = slimtune_command.get_command(click.Context(slimtune_command), words[0])
        assert verb is not None, f"{page}: no verb {words[0]}"
        if len(words) > 1:  # else the verb is only named
            # Parsing only: raises for an unknown flag, a missing argument, or a value that is no choice.
            verb.make_context(words[0], words[1:], resilient_parsing=False)
    else:
        assert words[0] in ("--help", "--version", "--debug")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_use_names_that_exist(page: Path) -> None:
    import slimtune

    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "slimtune":
                assert hasattr(slimtune, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), flags=re.M)
        # As GitHub makes them: lower case, no marks, hyphens for spaces.
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_shows_what_the_english_one_shows(chinese: Path) -> None:
    english = chinese.with_name(chinese.name.replace(".zh-CN", ""))
    shown, tables = [], []
    for page in (english, chinese):
        text = page.read_text(encoding="utf-8")
        shown.append([line.removesuffix(" --lang zh") for line in commands(page)])
        tables.append([line.count("|") for line in text.splitlines() if line.startswith("|")])
    assert shown[0] == shown[1]
    assert tables[0] == tables[1]
    assert f"]({chinese.name})" in english.read_text(encoding="utf-8")
    assert f"]({english.name})" in chinese.read_text(encoding="utf-8")


def test_the_glossary_points_at_modules_that_exist() -> None:
    rows = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines()[6:]
    where = [path for row in rows for path in re.findall(r"`([^`]+)`", row.split("|")[3])]
    assert len(where) > 30
    assert [path for path in where if not (ROOT / "src/slimtune" / path).exists()] == []
