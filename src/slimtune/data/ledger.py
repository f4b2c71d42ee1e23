"""The account of every row: what was dropped or repaired, where it stood, and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

from slimtune.data.sources import Place

__all__ = ["Ledger"]

_SINGLY = 100_000
"""Rows of one file that one rule names one by one: a packed file of a megabyte may hold a hundred million of a kind."""
_LINE_ENDS = {end: f"\\u{end:04x}" for end in (0x85, 0x2028, 0x2029)}
"""What JSON allows in a string and many readers take for the end of a line; names in broken rows may hold them."""


@dataclass(slots=True)
class Ledger:
    """Writes ``ledger.jsonl`` and keeps the counts: rows in = rows trained + rows dropped.

    One line of the file is ``{"file", "line" or "row", "action", "rule", "field", "reason"}``; the action is
    ``dropped``, ``repaired`` or ``noted``. A stretch of a table's rows that hold nothing is one line with ``rows``, how
    many they are.
    """

    file: TextIO
    rows_in: int = 0
    rows_trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    rows_repaired: int = 0
    _lines: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _beyond: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def drop(self, place: Place, rule: str, reason: str, where: str = "", *, rows: int = 1) -> None:
        """Account for a row that is not trained on, or for ``rows`` from it on."""
        self.dropped[rule] += rows
        self._write(place, "dropped", rule, reason, where, rows)

    def repair(self, place: Place, rules: list[str], meanings: dict[str, str]) -> None:
        """Account for a row that named rules changed."""
        self.rows_repaired += bool(rules)
        for rule in dict.fromkeys(rules):
            self.repaired[rule] += 1
            self._write(place, "repaired", rule, meanings[rule], "")

    def note(self, place: Place, rules: list[str], meanings: dict[str, str]) -> None:
        """Count what the template did to a row."""
        for rule in dict.fromkeys(rules):
            self.noted[rule] += 1
            self._write(place, "noted", rule, meanings[rule], "")

    def _write(self, place: Place, action: str, rule: str, reason: str, where: str, rows: int = 1) -> None:
        entry: dict[str, Any] = {"file": place.file, place.unit: place.number, "action": action, "rule": rule}
        if rows > 1:
            entry["rows"] = rows
        if where:
            entry["field"] = where
        entry["reason"] = reason
        shown = f"{place}{', field ' + repr(where) if where else ''}: {reason}"
        self.examples.setdefault(rule, _printable(shown))
        kind = (place.file, action, rule)
        self._lines[kind] += 1
        if self._lines[kind] <= _SINGLY:
            self._write_line(entry)
            return
        reason = f"as the {_SINGLY:,} above"
        summed = self._beyond.setdefault(kind, {**entry, "rows": 0, "to": 0, "field": "", "reason": reason})
        summed["rows"] += rows
        summed["to"] = place.number + rows - 1

    def _write_line(self, entry: dict[str, Any]) -> None:
        self.file.write(_printable(json.dumps(entry, ensure_ascii=False)).translate(_LINE_ENDS) + "\n")

    def finish(self) -> None:
        """Write the lines that stand for many rows."""
        for summed in self._beyond.values():
            self._write_line({key: value for key, value in summed.items() if value != ""})

    @property
    def rows_dropped(self) -> int:
        """Rows that are not trained on."""
        return self.dropped.total()

    def facts(self) -> dict[str, Any]:
        """The counts, as plain values."""
        return {
            "rows": self.rows_in,
            "rows_trained": self.rows_trained,
            "rows_dropped": self.rows_dropped,
            "rows_repaired": self.rows_repaired,
            "dropped": dict(self.dropped.most_common()),
            "repaired": dict(self.repaired.most_common()),
            "noted": dict(self.noted.most_common()),
            "examples": self.examples,
        }


def _printable(text: str) -> str:
    """Text that any file can hold: lone surrogates, which names in broken rows may have, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
