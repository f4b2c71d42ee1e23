"""The language that a person is spoken to in: English, or Chinese."""

from __future__ import annotations

import os
from typing import Literal

__all__ = ["Lang", "language", "set_language"]

Lang = Literal["en", "zh"]

_LOCALES = ("LC_ALL", "LC_MESSAGES", "LANG")
_asked: list[Lang] = []
"""What ``--lang`` asks for, in the command's own process."""


def language() -> Lang:
    """What was asked for; else the locale's, by the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    if _asked:
        return _asked[-1]
    name = next(filter(None, map(os.environ.get, _LOCALES)), "")
    return "zh" if name.lower().startswith("zh") else "en"


def set_language(lang: Lang | None) -> None:
    """Speak this language from now on; None: the locale's."""
    _asked[:] = [] if lang is None else [lang]
