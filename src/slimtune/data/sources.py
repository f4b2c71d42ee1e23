"""Where rows come from: each entry of ``data`` or ``eval``, with how many of its rows and how often they count.

An entry is a file, a folder, ``FOLDER:PART``, a pattern, or a hub data set (:mod:`slimtune.data.files` says which files
that means); ``#500`` behind it takes a sample, ``*2`` gives it a weight.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from slimtune.config import Config
from slimtune.data.files import Found, find_files
from slimtune.data.hub import hub_fingerprint, hub_rows
from slimtune.data.readers import ENDINGS, file_rows, format_of
from slimtune.data.rows import ROW_LIMIT, Place, Row
from slimtune.data.stdin import is_stdin
from slimtune.errors import UserError

__all__ = [
    "ROW_LIMIT",
    "Place",
    "Row",
    "Source",
    "check_sources",
    "content_hash",
    "parse_source",
    "read_rows",
    "sources_of",
]

_RULE = f"Data is a file ({ENDINGS}), a folder, a pattern, or a hub id (owner/name, owner/name:split)."


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of ``data`` or ``eval``: where it is, how many rows of it, and how often it counts."""

    name: str
    """As given: local path, pattern or hub id."""
    sample: int | None = None
    weight: float = 1.0
    found: Found = field(default_factory=lambda: Found(()))
    """Its files; none for a hub data set."""

    @property
    def is_local(self) -> bool:
        """Whether it is made of files on this machine."""
        return bool(self.found.files)

    @property
    def label(self) -> str:
        """The name in messages: a file's own, without its folder."""
        return self.found.files[0].label if len(self.found.files) == 1 else self.name


def parse_source(text: str) -> Source:
    """Parse ``path``, ``folder:part``, a pattern or ``owner/name:split``, each with ``#500`` (a sample) and ``*2`` (a
    weight) behind it.

    Raises:
        UserError: The sample or weight is no positive number, or there is nothing of that name.
    """
    name, sample, weight = text, None, 1.0
    found = find_files(name)
    while found is None and (parts := re.fullmatch(r"(.+)([#*])([^#*/]*)", name)):
        before, mark, number = parts.groups()
        well_formed = re.fullmatch(r"\d+" if mark == "#" else r"\d+(\.\d+)?", number) is not None
        if not well_formed or float(number) <= 0:
            if glob.has_magic(name) and not well_formed:
                break  # a pattern that nothing matches
            raise UserError(
                f"data {text!r}: {mark}{number} is no {'number of rows' if mark == '#' else 'weight'}",
                rule="file#500 takes a seeded sample of 500 rows; file*2 counts a source twice.",
            )
        name = before
        if mark == "#":
            sample = int(number)
        else:
            weight = float(number)
        found = find_files(name)
    if found is None:
        _check_hub_id(name)
        return Source(name, sample, weight)
    if found.hub:
        name = found.hub
    described = found.description.sample if found.description is not None else None
    return Source(name, sample or described, weight, found)


def sources_of(config: Config) -> tuple[list[Source], list[Source]]:
    """The sources of ``data``, and those of ``eval``. Files of one name in several folders are labelled by their paths.

    Raises:
        UserError: As :func:`parse_source`.
    """
    data, held_out = ([parse_source(text) for text in texts] for texts in (config.data, config.eval))
    paths: dict[str, set[Path]] = {}
    for source in (*data, *held_out):
        for file in source.found.files:
            paths.setdefault(file.label, set()).add(file.path.resolve())

    def told_apart(source: Source) -> Source:
        files = tuple(
            replace(file, label=str(file.path)) if len(paths[file.label]) > 1 else file for file in source.found.files
        )
        return replace(source, found=replace(source.found, files=files))

    return [told_apart(source) for source in data], [told_apart(source) for source in held_out]


def check_sources(config: Config) -> list[str]:
    """See that there is something of each name in ``data`` and ``eval``. No row is read.

    Returns:
        Those that are data sets of the hub.

    Raises:
        UserError: No data is named, or as :func:`parse_source`.
    """
    if not config.data:
        raise UserError("no data given", way_out="slimtune train MODEL DATA, with DATA a local file or a hub id.")
    sources = [parse_source(name) for name in (*config.data, *config.eval) if not is_stdin(name)]
    return [source.name for source in sources if not source.is_local]


def _check_hub_id(name: str) -> None:
    if name == "-":
        raise UserError(
            "data - (standard input) can't be read here", way_out="Write it into a file, and give that file."
        )
    if glob.has_magic(name):
        raise UserError(f"no file matches {name}", rule="* stands for any text in a name, ** for any folders.")
    path = Path(name).expanduser()
    looks_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.+-]+)?", name) is not None
    if format_of(path.name) is not None or not looks_hub:
        near = _similar_file(path)
        raise UserError(
            f"data {name} does not exist",
            rule=_RULE,
            way_out=f"Did you mean {near}?" if near else "Check the path.",
        )


def _similar_file(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / near[0]) if near else ""


def read_rows(source: Source, *, seed: int = 0, whole: str = "text") -> Iterator[Row]:
    """The rows of a source in file order; with ``sample``, a seeded choice of them in file order.

    Args:
        source: From :func:`parse_source`.
        seed: Decides the sample.
        whole: What one row of a text file is, as :func:`slimtune.data.readers.file_rows` has it.

    Raises:
        UserError: A file can't be read as what it says it is: empty, cut off, no such format, broken compression.
    """
    if source.sample is None:
        yield from _all_rows(source, whole)
        return
    total = sum(row.rows for row in _all_rows(source, whole))
    if source.sample >= total:
        yield from _all_rows(source, whole)
        return

    import numpy as np  # a mistake is answered without it

    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng([seed, total]).choice(total, source.sample, replace=False)] = True
    at = 0
    for row in _all_rows(source, whole):
        taken = int(np.count_nonzero(chosen[at : at + row.rows]))
        at += row.rows
        if taken:
            yield row if taken == row.rows else replace(row, rows=taken)


def _all_rows(source: Source, whole: str) -> Iterator[Row]:
    description = source.found.description
    files = source.found.files
    parts = (file_rows(file.path, file.label, whole=whole) for file in files) if files else (hub_rows(source.name),)
    for rows in parts:
        if description is None:
            yield from rows
        else:
            yield from (replace(row, value=description.row(row.value)) for row in rows)


def content_hash(source: Source) -> str:
    """SHA-256 of all bytes that the rows come from: of the file, of all files and their names, or the fingerprint that
    ``datasets`` gives a hub data set.

    Raises:
        UserError: A file can't be read.
    """
    if not source.is_local:
        return hub_fingerprint(source.name)
    hashes = {file.label: _file_hash(file.path) for file in source.found.files}
    if len(hashes) == 1 and source.found.description is None:
        return next(iter(hashes.values()))
    return hashlib.sha256(repr((sorted(hashes.items()), source.found.description)).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"data {path} can't be read: {error}") from None
