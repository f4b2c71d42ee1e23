"""Texts as wide as a terminal shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

__all__ = ["CHINESE", "aligned", "breaks", "cells", "folded"]

CHINESE = "\u2e80-\u2fff\u3000-\u9fff\uf900-\uffef"
"""Characters of Chinese text, as a class of a regular expression has them."""
_OPENING, _CLOSING = "（“「《", "，。、；：！？）”」》…"
_UNIT = re.compile(f"[{_OPENING}]*(?:[^\\s{CHINESE}{_OPENING}{_CLOSING}]+|[{CHINESE}])[{_CLOSING}]*\\s*|\\s+|.")
"""What no line break may cut: a word, or a Chinese character with the signs that cling to it."""


def cells(text: str) -> int:
    """Cells that a text takes in a terminal: Chinese characters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # not on the way of English

    return cell_len(text)


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines: each cell where its column begins, two cells behind the one before."""
    rows = list(rows)
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    return [
        "".join("  " + cell + " " * (width - cells(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def breaks(line: str, width: int) -> list[int]:
    """Where a line is to be broken, so that each part has at most ``width`` cells: between words, Chinese between
    characters, but before no closing sign and behind no opening one. What is longer (a path) stays whole."""
    found, used = [], 0
    for unit in _UNIT.finditer(line):
        if used and used + cells(unit[0].rstrip()) > width:
            found.append(unit.start())
            used = 0
        used += cells(unit[0])
    return found


def folded(text: str, width: int) -> list[str]:
    """The lines of a text, broken by :func:`breaks`."""
    lines = []
    for paragraph in text.split("\n"):
        at = [0, *breaks(paragraph, width), len(paragraph)]
        lines += [paragraph[start:end].rstrip() for start, end in pairwise(at)]
    return lines
