"""What slimtune says, in the language that a person reads.

The source says everything in English. Where it is shown, :func:`told` looks it up in ``locale/zh.po``, in gettext's
format, whose ids are the English texts with ``{}`` for what they name. So no place that says something knows of
languages, and what has no translation is shown in English (``tests/test_words.py`` lets none of ours be so).
"""

from __future__ import annotations

import ast
import gettext
import re
from functools import cache
from pathlib import Path
from typing import Any

from slimtune.language import language

__all__ = ["CATALOGUE", "Catalogue", "catalogue", "in_chinese", "told", "told_cell"]

CATALOGUE = Path(__file__).parent / "locale" / "zh.po"
_STRING = re.compile(r'(?:(msgctxt|msgid|msgstr) )?("(?:[^"\\]|\\.)*")')
_JOINTS = {"; ": "；", ", or ": "，或", ", ": "，", " · ": " · "}
"""What stands between the parts of a line, and what stands there in Chinese."""
_SHORT = {16: " ", 27: ". "}
"""A text shorter than this tells little, so it names nothing that holds that: no words, no sentences."""
_BEGINS = 4
"""A text that begins with so many letters of its own may name words, however short: "Go on: {}"."""
_SAYS = 3
"""Blanks in a text that says something, and is no name that somebody gave."""
_PLACE = re.compile(r"(.+?:\d+(?:: \w+(?=: ))?): (.+)", re.DOTALL)
"""A row's file and line, or its field too, and what is said of it."""
_SENTENCES = re.compile(r"(?<=\.) (?=[A-Z{])")
PART = "part"
"""The context of what is a part of other texts: a short word that may be somebody's file or folder too."""
TABLE = "table"
"""The context of what stands in a table, whose cells are names and values too: nothing else is told of these."""


def told(text: str) -> str:
    """``text`` as it is shown: in Chinese where that is spoken and the catalogue knows it."""
    return in_chinese(text) if language() == "zh" else text


def told_cell(text: str) -> str:
    """A table's cell as it is shown: names and values as they are, what is said of them as :func:`told` has it."""
    return catalogue().cell(text) if language() == "zh" else text


def in_chinese(text: str) -> str:
    """``text`` in Chinese, or as it is if the catalogue doesn't know it."""
    return catalogue().told(text) or text


class Catalogue(gettext.NullTranslations):
    """The texts of a .po file: whole ones, and those that name something; a table's by themselves."""

    def __init__(self, fp: Any = None) -> None:
        self.whole: dict[str, str] = {}
        self.parts: dict[str, str] = {}
        self.cells: dict[str, str] = {}
        self._patterns: list[tuple[str, str]] = []
        super().__init__(fp)
        for name, text in {**self.whole, **self.parts}.items():
            if "{}" in name:
                self._patterns.append((name, text))
        # The most that is known first: "{}: {}" fits nearly everything.
        self._patterns.sort(key=lambda pair: -len(pair[0].replace("{}", "")))
        self._longest = [max(map(_plain, name.split("{}")), key=len) for name, _ in self._patterns]

    def _parse(self, fp: Any) -> None:
        """Read a .po file, as :mod:`gettext` has it done by who brings a format of files."""
        kinds = {PART: self.parts, TABLE: self.cells}
        entry: dict[str, str] = {}
        key = ""
        for line in [*fp, "\n"]:
            found = _STRING.fullmatch(line.strip())
            if found is None:
                if entry.get("msgid") and entry.get("msgstr"):
                    kinds.get(entry.get("msgctxt", ""), self.whole)[entry["msgid"]] = entry["msgstr"]
                entry = {}
                continue
            key = found[1] or key
            entry[key] = entry.get(key, "") + ast.literal_eval(found[2])

    def told(self, text: str, *, part: bool = False) -> str | None:
        """The translation of ``text``; None if there is none. ``part``: it stands in another text."""
        is_said = text.count(" ") >= _SAYS or (text.endswith(".") and " " in text)
        exact = self.parts.get(text) or (self.whole.get(text) if is_said or not part else None)
        if exact is not None:
            return exact
        for joint, in_its_place in _JOINTS.items():
            pieces = text.split(joint)
            if len(pieces) > 1:
                made = [self.told(piece, part=True) for piece in pieces]
                if None not in made:
                    return in_its_place.join(map(str, made))
        for (name, translation), longest in zip(self._patterns, self._longest, strict=True):
            if longest in text and (found := _pattern(name).fullmatch(text)) is not None:
                if any(mark in group for mark in _barred(name) for group in found.groups()):
                    continue
                if name.startswith("{} ") and ": " in found[1]:  # what it is said of is no more than a name
                    continue
                return translation.format(*(self.told(group, part=True) or group for group in found.groups()))
        if (found := _PLACE.fullmatch(text)) is not None and (said := self.told(found[2], part=True)) is not None:
            return f"{found[1]}：{said}"
        sentences = _SENTENCES.split(text)
        told_one_by_one = [self.told(sentence, part=part) for sentence in sentences] if len(sentences) > 1 else [None]
        return None if None in told_one_by_one else "".join(map(str, told_one_by_one))

    def cell(self, text: str) -> str:
        """The translation of a table's cell; ``text`` itself if it is a name or a value."""
        if text in self.cells:
            return self.cells[text]
        for name, translation in self.cells.items():
            if (found := _pattern(name).fullmatch(text)) is not None:
                return translation.format(*found.groups())
        return text


def _barred(name: str) -> list[str]:
    """What isn't in anything that a text of the catalogue names."""
    return [mark for most, mark in _SHORT.items() if len(name) < most and (mark != " " or name.find("{}") < _BEGINS)]


def _plain(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("(.*?)".join(re.escape(_plain(piece)) for piece in name.split("{}")), re.DOTALL)


@cache
def catalogue() -> Catalogue:
    """The Chinese one."""
    with CATALOGUE.open(encoding="utf-8") as file:
        return Catalogue(file)
