"""A row and its place, and what is said of both: its refusal, a value's kind, its columns; values written as text.

JSON is read by one decoder wherever it stands: a key that is there twice is refused, for nobody knows which was meant.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DECODER",
    "ROW_LIMIT",
    "DuplicateKey",
    "Place",
    "Row",
    "RowRefused",
    "from_text",
    "kind_of",
    "listed",
    "without_absent",
]

ROW_LIMIT = 64 * 2**20
"""Most characters that one row may have: a longer line is skipped, counted and named."""

_MOST_NOTATION = 2**20
"""Most characters that Python's own reader is given: it takes some hundred bytes for each."""
_FREE_KEYS = ("tools", "functions", "arguments", "parameters", "args", "input", "response", "json")
"""Columns and keys under which an object's keys are anyone's: tools, and what a call or its result holds (OpenAI,
Anthropic, Bedrock, Gemini)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: line (text files) or row number (parquet, hub, a line with several rows), counted from 1.

    No two rows of a source stand in the same place.
    """

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file} row {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place and its value, or the reason why it can't be read."""

    place: Place
    value: Any
    refused: str = ""
    repairs: tuple[str, ...] = ()
    """Rules by which the reader mended it."""
    rows: int = 1
    """For how many rows, one behind another, it stands: a stretch of a table in which there is nothing is one."""


class DuplicateKey(ValueError):
    """An object in JSON has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        counts = Counter(keys)
        raise DuplicateKey(next(f"key {key[:80]!r} stands twice" for key in keys if counts[key] > 1))
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Of a row, and of what stands in it as text; raises :class:`DuplicateKey`."""


class RowRefused(Exception):
    """A row can't be trained on: the field, the rule it breaks, and the rule's short name."""

    def __init__(self, field: str, rule: str, name: str = "shape") -> None:
        self.field, self.rule, self.name = field, rule, name
        super().__init__(f"{field}: {rule}" if field else rule)


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, float) and value != value:
        return "NaN"
    names = {
        bool: "true or false",
        bytes: "binary data",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def listed(value: Mapping[str, Any]) -> str:
    """The first names of a row's columns."""
    names = [str(key)[:40] for key in value]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"


def from_text(where: str, text: str, repairs: list[str], name: str = "shape") -> Any:
    """The list or object that stands in a text, as JSON or as Python prints it.

    Tables hold lists as JSON text; pandas writes them to csv in Python's notation, and some writers encode twice.

    Args:
        where: The field.
        text: What stands in it.
        repairs: Takes the name of the rule that read something else than JSON.
        name: The rule's name where it can't be read.

    Raises:
        RowRefused: It is neither, or a key stands twice.
    """
    try:
        value = DECODER.decode(text)
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            value = DECODER.decode(value)
            repairs.append("encoded-twice")
        return value
    except DuplicateKey as error:
        raise RowRefused(where, str(error), name) from None
    except (ValueError, RecursionError):
        pass
    try:
        is_short = len(text) <= _MOST_NOTATION and text.lstrip()[:1] in ("{", "[")
        value = ast.literal_eval(text.strip()) if is_short else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if value is None:
        raise RowRefused(where, "text that is no JSON", name)
    repairs.append("python-notation")
    return value


def without_absent(value: Any, found: list[str], *, inside: bool = False) -> Any:
    """A row out of a table without the nulls in its tools, calls and results: their objects' keys are anyone's.

    A table gives each object of a column the same keys, with null for those that an object hasn't. Whether its writer
    meant null can't be known there. Elsewhere readers take null for an absent key.

    Args:
        value: The row, or what stands in it.
        found: Takes the names of the keys that were left out.
        inside: Whether it stands in tools, a call's arguments or its result.
    """
    if isinstance(value, Mapping):
        made = {}
        for key, item in value.items():
            if inside and item is None:
                found.append(str(key))
            else:
                made[key] = without_absent(item, found, inside=inside or key in _FREE_KEYS)
        return made
    if isinstance(value, list):
        return [without_absent(item, found, inside=inside) for item in value]
    return value
