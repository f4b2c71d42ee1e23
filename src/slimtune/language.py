"""The language that a person is spoken to in: English, or Chinese."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

__all__ = ["LANGUAGES", "Lang", "language", "speak", "spoken"]

Lang = Literal["en", "zh"]
LANGUAGES: tuple[Lang, ...] = get_args(Lang)

_LOCALES = ("LC_ALL", "LC_MESSAGES", "LANG")
_asked: list[Lang] = []
"""What ``--lang`` asks for; the last one holds."""


def language() -> Lang:
    """What was asked for; else the locale's, by the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    if _asked:
        return _asked[-1]
    name = next(filter(None, map(os.environ.get, _LOCALES)), "")
    return "zh" if name.lower().startswith("zh") else "en"


def speak(lang: Lang) -> None:
    """Speak this language from now on, in the command's own process."""
    _asked.append(lang)


@contextmanager
def spoken(lang: Lang) -> Iterator[None]:
    """Within this, this language is spoken."""
    _asked.append(lang)
    try:
        yield
    finally:
        _asked.pop()
