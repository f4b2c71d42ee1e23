"""What an explanation is made of: statements with a verdict, tables, bars; and the words they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slimtune.errors import shown
from slimtune.language import Lang

__all__ = [
    "Bar",
    "Explanation",
    "Facts",
    "Lang",
    "Say",
    "Section",
    "Statement",
    "Status",
    "Table",
    "code",
    "counted",
    "first_names",
    "is_finite",
    "listed",
    "part_name",
    "plain",
    "sentence",
    "share",
    "value_text",
]

Status = Literal["told", "proved", "broken", "unmeasured"]
Facts = Mapping[str, Any]
"""A run's facts, or a part of them (:class:`slimtune.run.facts.Facts`)."""
Say = Callable[[str, str], str]
"""Takes a text in English and in Chinese, gives the one that is asked for."""


@dataclass(frozen=True)
class Statement:
    """One sentence or a few, and whether a check stands behind them."""

    text: str
    status: Status = "told"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the columns numbered in ``numbers`` are aligned to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bar:
    """A quantity made of named pieces. The bars of one section share one scale."""

    label: str
    text: str
    pieces: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Section:
    """One subject. ``part`` says which of the four parts it belongs to; empty beyond them."""

    key: str
    part: str
    title: str
    statements: tuple[Statement, ...]
    bars: tuple[Bar, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """A run's story in one language."""

    lang: Lang
    run: str
    sections: tuple[Section, ...]

    def count(self, status: Status) -> int:
        """How many statements have this status."""
        return sum(statement.status == status for section in self.sections for statement in section.statements)


def part_name(number: int, say: Say) -> str:
    """The name of one of the four parts, 1 to 4."""
    return (
        say("Part 1 · preparation", "一、准备阶段"),
        say("Part 2 · LoRA", "二、LoRA 配置"),
        say("Part 3 · wrapping", "三、模型封装"),
        say("Part 4 · train and save", "四、训练与保存"),
    )[number - 1]


def share(part: float, whole: float) -> str:
    """``part`` of ``whole`` in percent."""
    ratio = part / whole if whole else 0.0
    return f"{ratio:.2%}" if ratio < 0.1 else f"{ratio:.0%}"


def value_text(value: Any, say: Say) -> str:
    """A loss or the like in four digits, or that it is no finite number."""
    return f"{value:.4g}" if is_finite(value) else say("not a finite number", "非有限数")


def is_finite(value: Any) -> bool:
    """Whether the value is a number, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def counted(number: float, noun: str, plural: str = "s") -> str:
    """1 step, 2 steps, 1.5 epochs; with ``plural`` 2 batches."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
    return f"{shown} {noun}{'' if number == 1 else plural}"


def first_names(names: Iterable[str], most: int = 5) -> str:
    """The first of some columns' names, each on one line and not too long: a, b, …"""
    shown = [name if len(name) <= 40 else name[:39] + "…" for name in map(plain, names)]
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")


def listed(items: Iterable[str], say: Say) -> str:
    """a, b and c · a、b 和 c."""
    words = list(items)
    if len(words) < 2:
        return "".join(words)
    head, tail = words[:-1], words[-1]
    # Chinese text stands off from Latin by a space, and from Chinese by none.
    left, right = (" " if side.isascii() else "" for side in (head[-1][-1:], tail[:1]))
    return say(f"{', '.join(head)} and {tail}", f"{'、'.join(head)}{left}和{right}{tail}")


def sentence(text: str) -> str:
    """The text with a capital at its head."""
    return text[:1].upper() + text[1:]


def code(value: Any) -> str:
    """A value as code: on one line, without backquotes of its own."""
    return f"`{plain(value).replace('`', chr(39))}`"


def plain(value: Any) -> str:
    """A value as text on one line."""
    return shown(" ".join(str(value).split()))
