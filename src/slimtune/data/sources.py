"""Rows of a file or a hub data set, one at a time, each with its place.

The reader is slimtune's own because the place of a row (file and line, or file and row) is what makes an error useful,
and because one bad row must cost one row, not the file. Memory is bounded by the largest row that is let in
(:data:`ROW_LIMIT`), not by the file. Bytes that are no UTF-8 come through as lone surrogates and are refused with the
row that holds them. Parquet and zstd are Arrow's.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slimtune.data.hub import hub_rows
from slimtune.errors import UserError

__all__ = ["ROW_LIMIT", "Place", "Row", "Source", "parse_source", "read_rows"]

ROW_LIMIT = 64 * 2**20
"""Most characters that one row may have: a longer line is skipped, counted and named."""

_CHUNK = 2**20
_FORMATS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet")
_PARQUET_BATCH = 256


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: line (text files) or row number (parquet, hub), counted from 1."""

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
    table: bool = False
    """Whether it comes from a table (parquet, Arrow, a hub data set), where null stands for an absent key too."""


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of ``data`` or ``eval``: where it is, how many rows of it, and how often it counts."""

    name: str
    """Local path or hub id, as given."""
    sample: int | None = None
    weight: float = 1.0

    @property
    def is_local(self) -> bool:
        """Whether the name is a file on this machine."""
        return Path(self.name).expanduser().is_file()

    @property
    def path(self) -> Path:
        """The local file."""
        return Path(self.name).expanduser()

    @property
    def label(self) -> str:
        """The name in messages and ledgers: the file's own, without its folder."""
        return self.path.name if self.is_local else self.name


def parse_source(text: str) -> Source:
    """Parse ``path``, ``owner/name:split``, each with ``#500`` (a sample) and ``*2`` (a weight) behind it.

    Raises:
        UserError: The sample or weight is no positive number, or the path is a folder or doesn't exist.
    """
    name, sample, weight = text, None, 1.0
    while not Path(name).expanduser().exists() and (found := re.fullmatch(r"(.+)([#*])([^#*/]*)", name)):
        name, mark, number = found.groups()
        if not re.fullmatch(r"\d+" if mark == "#" else r"\d+(\.\d+)?", number) or float(number) <= 0:
            raise UserError(
                f"data {text!r}: {mark}{number} is no {'number of rows' if mark == '#' else 'weight'}",
                rule="file#500 takes a seeded sample of 500 rows; file*2 counts a source twice.",
            )
        if mark == "#":
            sample = int(number)
        else:
            weight = float(number)
    source = Source(name, sample, weight)
    _check_exists(source)
    return source


def _check_exists(source: Source) -> None:
    path = source.path
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if _format_of(p.name) is not None)
        raise UserError(
            f"data {source.name} is a folder",
            rule="Data is a file (json, jsonl, csv, tsv, parquet, each also .gz or .zst) or a hub id.",
            way_out=f"Name the file{': ' + ', '.join(inside[:5]) if inside else '.'}",
        )
    if path.exists():
        return
    known_ending = _format_of(path.name) is not None
    looks_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.+-]+)?", source.name) is not None
    if known_ending or not looks_hub:
        near = _similar_file(path)
        raise UserError(
            f"data {source.name} does not exist",
            rule="Data is a local file (json, jsonl, csv, tsv, parquet, each also .gz or .zst) or a hub id "
            "(owner/name, owner/name:split).",
            way_out=f"Did you mean {near}?" if near else "Check the path.",
        )


def _similar_file(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / near[0]) if near else ""


def _format_of(filename: str) -> str | None:
    stem = filename.lower().removesuffix(".gz").removesuffix(".zst")
    ending = stem.rsplit(".", 1)[-1] if "." in stem else ""
    return ending if ending in _FORMATS else None


def read_rows(source: Source, *, seed: int = 0) -> Iterator[Row]:
    """The rows of a source in file order; with ``sample``, a seeded choice of them in file order.

    Raises:
        UserError: The file can't be read as what it says it is: empty, cut off, no such format, broken compression.
    """
    if source.sample is None:
        yield from _all_rows(source)
        return
    total = sum(1 for _ in _all_rows(source))
    if source.sample >= total:
        yield from _all_rows(source)
        return
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng([seed, total]).choice(total, source.sample, replace=False)] = True
    for take, row in zip(chosen, _all_rows(source), strict=True):
        if take:
            yield row


def _all_rows(source: Source) -> Iterator[Row]:
    if not source.is_local:
        for number, value in hub_rows(source.name):
            yield Row(Place(source.name, number, "row"), value, table=True)
        return
    path, label = source.path, source.label
    kind = _format_of(path.name)
    if kind is None:
        raise UserError(
            f"data {source.name} has an ending that slimtune doesn't read",
            rule="It reads .json, .jsonl, .csv, .tsv and .parquet, each also with .gz or .zst.",
            way_out="Rename or convert the file.",
        )
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data {source.name} is empty", rule="A data file holds at least one row.")
        with _open(path) as stream:
            if kind == "parquet":
                # parquet is read from its end: a compressed file is unpacked first
                yield from _parquet_rows(stream if path.suffix.lower() == ".parquet" else _spooled(stream), label)
            elif kind in ("csv", "tsv"):
                yield from _csv_rows(stream, label, "\t" if kind == "tsv" else ",")
            else:
                yield from _json_rows(stream, label, lines=kind != "json")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = "it is no gzip file" if isinstance(error, gzip.BadGzipFile) else str(error)
        raise UserError(
            f"data {source.name} can't be decompressed: {what}", way_out="Get the file again, or unpack it."
        ) from None
    except OSError as error:
        raise UserError(f"data {source.name} can't be read: {error}") from None


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"), _CHUNK)
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _CHUNK)
    return path.open("rb")


def _decoded(stream: IO[bytes], label: str) -> Iterator[str]:
    """Text in chunks; a BOM goes, bytes that are no UTF-8 become lone surrogates."""
    head = stream.read(_CHUNK)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"data {label} is UTF-16", rule="Data files are UTF-8.", way_out="Convert it to UTF-8.")
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    head = head.removeprefix(codecs.BOM_UTF8)
    while head:
        yield decoder.decode(head)
        head = stream.read(_CHUNK)
    yield decoder.decode(b"", final=True)


# -- JSON -------------------------------------------------------------------------------------------------------------


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(f"key {key!r} stands twice" for key in keys if keys.count(key) > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_SPACE = re.compile(r"[ \t\r\n]*")


def _json_rows(stream: IO[bytes], label: str, *, lines: bool) -> Iterator[Row]:
    """An array of rows, one row a line, or rows one after another: told by the text itself."""
    chunks = _decoded(stream, label)
    head = ""
    for chunk in chunks:
        head += chunk
        if head.strip(" \t\r\n"):
            break
    start = _SPACE.match(head).end()  # type: ignore[union-attr]
    if start == len(head):
        raise UserError(f"data {label} is empty", rule="A data file holds at least one row.")
    if head[start] == "[":
        yield from _array_rows(head, chunks, label, start)
    elif lines or _is_json(head[start:].split("\n", 1)[0]):
        yield from _line_rows(head, chunks, label)
    else:
        yield from _array_rows(head, chunks, label, start - 1, array=False)


def _is_json(line: str) -> bool:
    try:
        _DECODER.decode(line)
    except _DuplicateKey:
        return True
    except (ValueError, RecursionError):
        return False
    return True


def _parse_line(place: Place, line: str) -> Row:
    try:
        return Row(place, _DECODER.decode(line))
    except json.JSONDecodeError as error:
        at = "the line is cut off" if error.pos >= len(line.rstrip()) or "Unterminated" in error.msg else error.msg
        return Row(place, None, f"no valid JSON at column {error.colno}: {at}")
    except _DuplicateKey as error:
        return Row(place, None, str(error))
    except RecursionError:
        return Row(place, None, "nested too deeply")
    except ValueError as error:  # an integer of too many digits
        return Row(place, None, f"no valid JSON: {error}")


def _text_lines(head: str, chunks: Iterator[str]) -> Iterator[tuple[int, str | None, int]]:
    """(number, line, characters) for each line; the line is None where it is longer than ROW_LIMIT."""
    number, size = 1, 0
    parts: list[str] = []
    for chunk in itertools.chain([head], chunks):
        start = 0
        while (end := chunk.find("\n", start)) >= 0:
            size += end - start
            yield number, "".join([*parts, chunk[start:end]]) if size <= ROW_LIMIT else None, size
            number, parts, size, start = number + 1, [], 0, end + 1
        size += len(chunk) - start
        parts = [*parts, chunk[start:]] if size <= ROW_LIMIT else []
    if size:
        yield number, "".join(parts) if size <= ROW_LIMIT else None, size


def _line_rows(head: str, chunks: Iterator[str], label: str) -> Iterator[Row]:
    for number, line, size in _text_lines(head, chunks):
        place = Place(label, number)
        if line is None:
            yield Row(place, None, f"the line has {size:,} characters; one row may have {ROW_LIMIT:,}")
        elif line.strip(" \t\r"):
            yield _parse_line(place, line)


def _array_rows(head: str, chunks: Iterator[str], label: str, start: int, *, array: bool = True) -> Iterator[Row]:
    """Rows of one JSON array, or objects one after another, read with a buffer that holds one row."""
    text, at, line, ended = head, start + 1, head.count("\n", 0, start + 1) + 1, False
    need_comma, number = False, 0

    def refuse(what: str, way_out: str = "") -> UserError:
        return UserError(f"{label}:{line}: {what} in row {number + 1}", rule="The file must be valid JSON.",
                         way_out=way_out or "Mend that row, or write one row a line (.jsonl): then a bad row "
                         "costs itself alone.")  # fmt: skip

    while True:
        space = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        line += text.count("\n", at, space)
        at = space
        if at < len(text) and text[at] == "," and need_comma and array:
            at, need_comma = at + 1, False
            continue
        if at < len(text) and text[at] == "]" and array and (need_comma or number == 0):
            return
        if at < len(text) and need_comma and array:
            raise refuse("a comma or the closing bracket is missing")
        try:
            if at == len(text):
                raise json.JSONDecodeError("cut off", text, at)
            value, end = _DECODER.raw_decode(text, at)
            if end == len(text) and not ended and not isinstance(value, dict | list):
                raise json.JSONDecodeError("cut off", text, end)  # a number may go on in the next chunk
        except _DuplicateKey as error:
            raise refuse(str(error)) from None
        except RecursionError:
            raise refuse("nested too deeply") from None
        except json.JSONDecodeError as error:
            final = error.pos < len(text) - 16 and not error.msg.startswith("Unterminated")
            if final:
                raise refuse(
                    f"no valid JSON at line {line + text.count(chr(10), at, error.pos)}: {error.msg}"
                ) from None
            if ended:
                if at == len(text) and not array:
                    return
                raise refuse("the file is cut off", "Get the file again.") from None
            if len(text) - at > ROW_LIMIT:
                raise refuse(f"more than {ROW_LIMIT:,} characters") from None
            more, wanted = [text[at:]], max(len(text) - at, _CHUNK)
            while wanted > 0 and not ended:
                chunk = next(chunks, None)
                ended = chunk is None
                more.append(chunk or "")
                wanted -= len(chunk or "")
            text, at = "".join(more), 0
            continue
        except ValueError as error:
            raise refuse(str(error)) from None
        yield Row(Place(label, line), value)
        line += text.count("\n", at, end)
        at, need_comma, number = end, True, number + 1


# -- CSV and parquet --------------------------------------------------------------------------------------------------


def _csv_rows(stream: IO[bytes], label: str, delimiter: str) -> Iterator[Row]:
    lines = _csv_lines(stream, label)
    first = next(lines, "")
    if delimiter == "," and ";" in first and "," not in first:
        delimiter = ";"
    number = 0

    def feed() -> Iterator[str]:
        nonlocal number
        number = 1
        yield first
        for line in lines:
            number += 1
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    next_row = _wide(lambda: next(reader, None))
    try:
        header = [name.strip() for name in next_row() or []]
    except csv.Error as error:
        raise UserError(f"{label}:1: the header can't be read: {error}") from None
    if not any(header):
        raise UserError(f"data {label} is empty", rule="A csv file begins with a line that names its columns.")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{label}:1: column {twice[0]!r} stands twice", rule="Columns have names of their own.")
    while True:
        place = Place(label, number + 1)
        try:
            values = next_row()
        except csv.Error as error:
            end = "unexpected end of data" in str(error)
            yield Row(place, None, f"no valid csv: {'a quote is never closed' if end else error}")
            if end:
                return
            continue
        if values is None:
            return
        if not values:
            continue
        if len(values) != len(header):
            yield Row(place, None, f"{len(values)} fields, but the header names {len(header)} columns")
        else:
            # pandas writes nan for a value that is missing
            kept = (float("nan") if value in ("nan", "NaN") else value for value in values)
            yield Row(place, dict(zip(header, kept, strict=True)))


def _csv_lines(stream: IO[bytes], label: str) -> Iterator[str]:
    for _, line, size in _text_lines("", _decoded(stream, label)):
        if line is None:
            raise UserError(f"{label}: a line has {size:,} characters", rule=f"One row may have {ROW_LIMIT:,}.")
        yield line + "\n"


def _wide(step: Callable[[], list[str] | None]) -> Callable[[], list[str] | None]:
    """``step`` under a field limit of ROW_LIMIT; csv keeps its limit in a global, so it's put back after each row."""

    def call() -> list[str] | None:
        before = csv.field_size_limit(ROW_LIMIT)
        try:
            return step()
        finally:
            csv.field_size_limit(before)

    return call


def _parquet_rows(stream: IO[bytes], label: str) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(stream)
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for value in batch.to_pylist():
                number += 1
                yield Row(Place(label, number, "row"), value, table=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data {label} can't be read as parquet: {first}", way_out="Get the file again.") from None


def _spooled(stream: IO[bytes]) -> IO[bytes]:
    """A compressed file, unpacked into an unnamed temporary one."""
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the reader
    shutil.copyfileobj(stream, plain, _CHUNK)
    plain.seek(0)
    return plain
