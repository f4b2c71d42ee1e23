"""Which of the pages' commands `make docs-commands` types, and that nothing is left out without a reason."""

from __future__ import annotations

import re

import pytest

from tests.typed import NOT_TYPED, PAGES, Typed, answer_for, commands, typed_of

ALL = [typed for page in PAGES for typed in typed_of(page)]


def test_most_commands_are_typed_and_every_excuse_is_needed() -> None:
    typed = [each for each in ALL if each.excuse is None]
    assert len(typed) > 60
    assert {each.text.split()[1] for each in typed if each.text.startswith("slimtune ")} >= {
        "chat", "compare", "config", "data", "doctor", "eval", "explain", "export", "generate", "init", "merge", "plan",
        "push", "resume", "runs", "serve", "train", "watch",
    }  # fmt: skip
    for pattern in NOT_TYPED:
        assert any(re.fullmatch(pattern, each.text, re.DOTALL) for each in ALL), pattern


def test_capitals_stand_for_something() -> None:
    put = [each.with_words(1) for each in ALL if each.excuse is None]
    assert [text for text in put if re.search(r"\b(MODEL|DATA|RUN|FOLDER|OWNER|PROMPTS|OUT)\b", text)] == []
    assert Typed("", "slimtune eval RUN [DATA]").with_words(1) == "slimtune eval my-run chats.jsonl"


def test_a_command_goes_on_over_lines() -> None:
    page = "```console\n$ for i in 1 2; do\n>     echo $i\n> done\n$ torchrun -x \\\n    -m y\n```\n`slimtune runs`\n"
    assert list(commands(page)) == ["for i in 1 2; do\n    echo $i\ndone", "torchrun -x \\\n    -m y", "slimtune runs"]


@pytest.mark.parametrize(
    ("command", "code", "said"), [("read x; echo got $x; exit 3", 3, "got Hello"), ("tty", 0, "/dev/")]
)
def test_it_is_typed_in_a_terminal(command: str, code: int, said: str, tmp_path: object) -> None:
    ended, shown = answer_for(f"printf '> '; {command}", tmp_path, {"PATH": "/usr/bin:/bin"})  # type: ignore[arg-type]
    assert (ended, said in shown) == (code, True), shown
