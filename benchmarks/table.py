"""Adds the figures of result files to the one table of all of them.

    python benchmarks/table.py benchmarks/results/DATE-NAME.json …

``benchmarks/results.csv`` has a row a figure: date, benchmark, machine, the versions that matter, which case, what was
measured, its value. A file that is read again replaces its rows. The files themselves may go once nothing cites them:
they hold every single run, the table what came out.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("results.csv")
_VERSIONS = ("torch", "triton", "transformers")
_FILE = re.compile(r"(\d{4}-\d\d-\d\d)-(.+)")
_HEADER = {"date", "made", "gpu", "machine", "cpu", "processor", "device", "driver", "cuda", "versions", *_VERSIONS}
# What tells the entries of a list apart, in the order of a case's name.
_NAMES = (
    "workload",
    "shape",
    "size",
    "model",
    "family",
    "targets",
    "dtype",
    "case",
    "name",
    "who",
    "what",
    "engine",
    "clients",
    "call",
)


class Figure(NamedTuple):
    """A row of the table."""

    date: str
    benchmark: str
    machine: str
    torch: str
    triton: str
    transformers: str
    case: str
    measure: str
    value: str


def figures(file: Path) -> Iterator[Figure]:
    """A result file's figures.

    Raises:
        ValueError: Its name isn't DATE-NAME.json.
    """
    named = _FILE.fullmatch(file.stem)
    if named is None:
        raise ValueError(f"{file.name} isn't called DATE-NAME.json")
    yield from _inside(json.loads(file.read_text()), named[1], named[2], ("", {}), ())


def _inside(
    value: Any, date: str, benchmark: str, around: tuple[str, dict[str, str]], path: tuple[str, ...]
) -> Iterator[Figure]:
    """The figures inside a value; ``around``: the machine and versions that it stands under."""
    if isinstance(value, dict):
        versions = value.get("versions", {key: value[key] for key in _VERSIONS if isinstance(value.get(key), str)})
        around = (_machine(value) or around[0], {**around[1], **versions})
        for key, inner in value.items():
            if key not in (*_HEADER, *_NAMES):
                yield from _inside(inner, date, benchmark, around, (*path, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            if isinstance(inner, dict | list):
                yield from _inside(inner, date, benchmark, around, (*path[:-1], _name(inner) or f"{path[-1]} {at + 1}"))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        shown = f"{value:.5g}" if isinstance(value, float) else str(value)
        known = (around[1].get(name, "") for name in _VERSIONS)
        yield Figure(date, benchmark, around[0], *known, " · ".join(path[:-1]), path[-1], shown)


def _machine(header: dict[str, Any]) -> str:
    found = next((header[key] for key in ("gpu", "machine", "cpu", "processor", "device") if header.get(key)), "")
    return str(found.get("cpu", "") if isinstance(found, dict) else found)


def _name(entry: Any) -> str:
    return " ".join(str(entry[key]) for key in _NAMES if key in entry) if isinstance(entry, dict) else ""


def main(files: list[Path]) -> None:
    """Add or replace the files' rows."""
    new = [figure for file in files for figure in figures(file)]
    replaced = {(figure.date, figure.benchmark) for figure in new}
    kept: list[Figure] = []
    if TABLE.exists():
        with TABLE.open(newline="") as table:
            kept = [Figure(**row) for row in csv.DictReader(table)]
    rows = [figure for figure in kept if (figure.date, figure.benchmark) not in replaced] + new
    rows.sort(key=lambda figure: (figure.date, figure.benchmark))
    with TABLE.open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerows([Figure._fields, *rows])


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
