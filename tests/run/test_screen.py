"""Lines on the screen: broken between words in a terminal, whole elsewhere, and text is never markup."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from slimtune.language import Lang, spoken
from slimtune.run.screen import Screen

TEXT = "134.5 M parameters, 269.0 MB in 16 bits → 111.5 MB as loaded (nf4, bf16): embedding 56.6 MB bf16, [bold]MLP"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_words_stay_whole_and_clear_of_the_label(width: int) -> None:
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, force_terminal=True, color_system=None, width=width, soft_wrap=True)
    screen.say("base", TEXT)
    first, *rest = [line.rstrip() for line in out.getvalue().splitlines()]
    assert first.startswith("  base     134.5 M")
    assert all(line.startswith(" " * 11) and len(line) <= width for line in rest)
    assert " ".join([first[11:], *(line.strip() for line in rest)]).split() == TEXT.split()


def test_elsewhere_a_line_is_a_line() -> None:
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, width=40, soft_wrap=True)
    screen.warn(TEXT)
    assert out.getvalue() == f"  warning  {TEXT}\n"


def test_no_name_is_markup_or_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.say("saved", "runs/x[/b] [red]y/adapter")
    screen.warn("runs/\x1b[2J\u202ex is damaged")
    assert capsys.readouterr().err.splitlines() == [
        "  saved    runs/x[/b] [red]y/adapter",
        "  warning  runs/\\x1b[2J\\x202ex is damaged",
    ]


def test_chinese_fills_its_lines() -> None:
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, force_terminal=True, color_system=None, width=40, soft_wrap=True)
    with spoken("zh"):
        screen.say("chosen", "optim adamw_8bit: the same 8-bit states; paging moves them between GPU and RAM, "
                   "and here is no GPU")  # fmt: skip
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("  选定     ")
    assert all(cell_len(line) > 32 for line in lines[:-1])
    assert all(cell_len(line) <= 40 and line[11] not in "，。；：" for line in lines)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_bar_gives_way_to_what_a_step_says(width: int, lang: Lang) -> None:
    record = {"step": 1106, "steps": 1160, "loss": 1.2345, "tokens_per_second": 12_345.0, "memory_bytes": 2 << 30,
              "seconds_left": 3700.0}  # fmt: skip
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, force_terminal=True, color_system=None, width=width, soft_wrap=True)
    with spoken(lang), screen.training(1160):
        screen.record(record)
    (line,) = {line for line in re.split(r"[\r\n]|\x1b\[\S*?[A-Za-z]", out.getvalue()) if "1106/1160" in line}
    assert "…" not in line
    assert cell_len(line) <= width
    assert [word in line for word in ("1.2345", "1:01:40", "12,345", "2.00 GiB", "━━━━━━━━")] == [
        True, width >= 60, width >= 80, width >= 120, width >= 80
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lang", "said"),
    [
        ("en", "6% of what flows back is too small for FP8 by now: precision: bf16 loses none of it"),
        ("zh", "反向传播的数值中已有 6% 小得 FP8 存不下：precision: bf16 不会丢失"),
    ],
)
def test_what_fp8_loses_is_said_once_it_is_much(lang: Lang, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with spoken(lang):
        Screen().record({"step": 3, "steps": 4, "eval_fp8_lost": 0.049})
        assert not capsys.readouterr().err
        Screen().record({"step": 4, "steps": 4, "eval_fp8_lost": 0.06})
    assert said in capsys.readouterr().err
