"""The documents in the terminal, and what shells complete."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from slimtune.cli.help import TOPICS
from slimtune.language import LANGUAGES, Lang, spoken

RunHere = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def completed(*words: str) -> list[str]:
    """What bash is told for the last word, as (type, value)."""
    environment = {
        **os.environ,
        "_SLIMTUNE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    told = subprocess.run(
        [sys.executable, "-c", "from slimtune.cli import main; main()"],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return told.stdout.split()


@pytest.mark.parametrize("topic", TOPICS)
def test_each_topic_is_shown_without_links_that_lead_nowhere(topic: str, run_here: RunHere) -> None:
    shown = run_here("help", topic)
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout) > 1000
    assert "](" not in shown.stdout
    assert not any(len(line) > 100 for line in shown.stdout.splitlines())


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_each_topic_is_shown_whole(topic: str, language: Lang, run_here: RunHere) -> None:
    chinese = ROOT / "docs" / f"{topic}.zh-CN.md"
    document = chinese if language == "zh" and chinese.is_file() else ROOT / "docs" / f"{topic}.md"
    with spoken(language):  # --lang would hold for the rest of this process
        shown = run_here("help", topic)
    # Rich cuts what is wider than a table's column, and puts this character there.
    assert shown.stdout.count("…") == document.read_text(encoding="utf-8").count("…")


def test_a_pager_shows_colours_and_chinese_as_such() -> None:
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("LESS", "LESSCHARSET", "NO_COLOR")}
    subprocess.run(
        [sys.executable, "-c", "import sys; from slimtune.cli import main; sys.argv[1:] = ['help', 'guide']; main()"],
        env=environment | {"PAGER": "printenv LESS LESSCHARSET", "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs, timeout=60, check=True,
    )  # fmt: skip
    os.close(theirs)
    said = os.read(ours, 4096).split()
    os.close(ours)
    assert said == [b"-FRX", b"utf-8"]


def test_chinese_has_no_spaces_between_its_signs_and_fills_its_lines(run_here: RunHere) -> None:
    with spoken("zh"):
        shown = run_here("help", "guide").stdout
    assert re.search(r"[，。：；] [\u4e00-\u9fff（]", shown) is None
    first = next(block for block in shown.split("\n\n") if "SmolLM2-135M" in block)
    assert len(lines := first.strip().splitlines()) > 2
    assert all(90 < cell_len(line.rstrip()) <= 100 for line in lines[:-1]), first


def test_what_is_no_topic_is_told_with_the_nearest(run_here: RunHere) -> None:
    assert "Did you mean 'reliability'?" in run_here("help", "relability").stderr
    assert "slimtune train --help" in run_here("help", "train").stderr
    listed = run_here("help")
    assert listed.returncode == 0
    assert all(topic in listed.stdout for topic in TOPICS)


def test_wheels_hold_each_topic() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    chinese = [f"{topic}.zh-CN" for topic in TOPICS if (ROOT / "docs" / f"{topic}.zh-CN.md").is_file()]
    assert included == {f"docs/{name}.md": f"slimtune/docs/{name}.md" for name in [*TOPICS, *chinese]}


def test_verbs_flags_topics_and_files_are_completed() -> None:
    assert completed("slimtune", "tra") == ["plain,train"]
    assert "plain,--lora-r" in completed("slimtune", "train", "--lora")
    assert completed("slimtune", "help", "rel") == ["plain,reliability"]
    assert completed("slimtune", "chat", "runs/") == ["file,runs/"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_calls_this_command(shell: str, run_here: RunHere) -> None:
    script = run_here("completion", shell)
    assert script.returncode == 0, script.stderr
    assert f"_SLIMTUNE_COMPLETE={shell}_complete" in script.stdout
