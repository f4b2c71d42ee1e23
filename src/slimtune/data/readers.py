"""Rows of one file, one at a time, each with its place: JSON, JSON lines, csv, tsv, text; tables by :mod:`.tables`.

The readers are slimtune's own because the place of a row (file and line, or file and row) is what makes an error
useful, and because one bad row must cost one row, not the file. Memory is bounded by the largest row that is let in
(:data:`slimtune.data.rows.ROW_LIMIT`), not by the file. Bytes that are no UTF-8 come through as lone surrogates and are
refused with the row that holds them. Parquet, Arrow and zstd are Arrow's, which is imported when there is such a file:
that takes longer than all else of a mistake's answer.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from slimtune.data.rows import DECODER, ROW_LIMIT, DuplicateKey, Place, Row
from slimtune.errors import UserError

__all__ = ["ENDINGS", "TO_UTF8", "file_rows", "format_of"]

ENDINGS = "json, jsonl, csv, tsv, txt, parquet or arrow, each also .gz or .zst"
"""The endings that are read, for messages."""

TO_UTF8 = "Convert the file: iconv -f GBK -t UTF-8 FILE > NEW (for GBK the encoding that it has, such as LATIN1)."
"""What to do with a file of another encoding."""

_CHUNK = 2**20
_FORMATS = {
    "json": "json", "jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv", "tsv": "tsv", "txt": "txt",
    "parquet": "parquet", "arrow": "arrow", "feather": "arrow",
}  # fmt: skip
_WRAPPERS = ("data", "train", "rows", "records", "examples", "samples", "items", "instances", "dataset")


def format_of(filename: str) -> str | None:
    """What a file is by its ending: json, jsonl, csv, tsv, txt, parquet or arrow; None if it is none of these."""
    stem = filename.lower().removesuffix(".gz").removesuffix(".zst")
    return _FORMATS.get(stem.rsplit(".", 1)[-1]) if "." in stem else None


def file_rows(path: Path, label: str, *, whole: str = "text") -> Iterator[Row]:
    """The rows of a file in their order.

    Args:
        path: The file.
        label: Its name in messages and places.
        whole: What one row of a text file is: ``text`` a stretch between blank lines, ``text-lines`` a line,
            ``text-whole`` all of it.

    Raises:
        UserError: It can't be read as what it says it is: empty, cut off, no such format, broken compression.
    """
    kind = format_of(path.name)
    if kind is None:
        raise UserError(
            f"data {path} has an ending that slimtune doesn't read",
            rule=f"It reads {ENDINGS}.",
            way_out="Rename or convert the file.",
        )
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data {path} is empty", rule="A data file holds at least one row.")
        with _open(path) as stream:
            if kind in ("parquet", "arrow"):
                from slimtune.data.tables import spooled, table_file

                # parquet is read from its end: a compressed file is unpacked first
                plain = path.suffix.lower() not in (".gz", ".zst")
                yield from table_file(stream if plain else spooled(stream, label, path.stat().st_size), label, kind)
            elif kind in ("csv", "tsv"):
                yield from _csv_rows(stream, label, "\t" if kind == "tsv" else ",")
            elif kind == "txt":
                yield from _text_rows(stream, label, whole)
            else:
                yield from _json_rows(stream, label, lines=kind == "jsonl")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = "it is no gzip file" if isinstance(error, gzip.BadGzipFile) else str(error)
        raise UserError(
            f"data {path} can't be decompressed: {what}", way_out="Get the file again, or unpack it."
        ) from None
    except OSError as error:
        raise UserError(f"data {path} can't be read: {error}") from None


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"), _CHUNK)
    if path.name.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _CHUNK)
    return path.open("rb")


def _decoded(stream: IO[bytes], label: str) -> Iterator[str]:
    """Text in chunks; a BOM goes, bytes that are no UTF-8 become lone surrogates."""
    head = stream.read(_CHUNK)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        way_out = f"Convert it: iconv -f UTF-16 -t UTF-8 {shlex.quote(label)} > NEW"
        raise UserError(f"data {label} is UTF-16", rule="Data files are UTF-8.", way_out=way_out)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    head = head.removeprefix(codecs.BOM_UTF8)
    while head:
        yield decoder.decode(head)
        head = stream.read(_CHUNK)
    yield decoder.decode(b"", final=True)


# -- JSON -------------------------------------------------------------------------------------------------------------


_SPACE = re.compile(r"[ \t\r\n]*")
_KEY = re.compile(r'[ \t\r\n]*"([^"\\]*)"[ \t\r\n]*:[ \t\r\n]*')
_ROWS = re.compile(r"\[[ \t\r\n]*\{")


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
    first, _, others = head[start:].partition("\n")
    several = bool(others.strip()) and _is_json(first)  # each line is JSON by itself, be it a list of turns
    if head[start] == "[" and not several:
        yield from _array_rows(head, chunks, label, start)
    elif not lines and (inside := _wrapped(head, start, label)) is not None:
        yield from _array_rows(head, chunks, label, inside, wrapped=True)
    elif lines or several or _is_json(first):
        yield from _line_rows(head, chunks, label)
    else:
        yield from _array_rows(head, chunks, label, start - 1, array=False)


def _wrapped(text: str, at: int, label: str) -> int | None:
    """Where the list of rows begins in a file that is one object around it, as ``{"version": 1, "data": [{…}, …]}``.

    None where the object is a row itself. What stands before the list is short.

    Raises:
        UserError: Another list of rows stands before it.
    """
    before = ""
    try:
        while (key := _KEY.match(text, at + 1)) is not None:
            at = key.end()
            if _ROWS.match(text, at):
                if key[1] in _WRAPPERS:
                    if before:
                        raise _several_lists(label, before)
                    return at
                before = key[1]
            _, at = DECODER.raw_decode(text, at)
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            if text[at : at + 1] != ",":
                return None
    except (ValueError, RecursionError):
        pass
    return None


def _several_lists(label: str, name: str) -> UserError:
    return UserError(
        f"{label} holds a second list of rows, {name!r}",
        rule="A file is one list of rows; which of them to train on isn't guessed.",
        way_out="Write each list into a file of its own; one of them can be held out by --eval.",
    )


def _check_end(text: str, chunks: Iterator[str], label: str, *, wrapped: bool) -> None:
    """See that no row stands behind a list of rows, or behind the object that it is ``wrapped`` in.

    Raises:
        UserError: Something does that isn't read.
    """
    refused = UserError(
        f"{label}: something that isn't read stands behind its list of rows",
        rule="A file is one list of rows.",
        way_out="Write each list into a file of its own, or one row a line (.jsonl).",
    )
    if wrapped:
        text = '{"": 0' + text
        while len(text) <= ROW_LIMIT and (chunk := next(chunks, None)) is not None:
            text += chunk
        try:
            others, end = DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            raise refused from None
        for name, item in others.items():
            if isinstance(item, list) and item and isinstance(item[0], dict):
                raise _several_lists(label, name)
        text = text[end:]
    if any(part.strip(" \t\r\n") for part in itertools.chain([text], chunks)):
        raise refused


def _is_json(line: str) -> bool:
    try:
        DECODER.decode(line)
    except DuplicateKey:
        return True
    except (ValueError, RecursionError):
        return False
    return True


def _parse_line(place: Place, line: str) -> Row:
    try:
        return Row(place, DECODER.decode(line))
    except json.JSONDecodeError as error:
        at = "the line is cut off" if error.pos >= len(line.rstrip()) or "Unterminated" in error.msg else error.msg
        return Row(place, None, f"no valid JSON at column {error.colno}: {at}")
    except DuplicateKey as error:
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


def _array_rows(
    head: str, chunks: Iterator[str], label: str, start: int, *, array: bool = True, wrapped: bool = False
) -> Iterator[Row]:
    """Rows of one JSON array, or objects one after another, read with a buffer that holds one row.

    Raises:
        UserError: No JSON; or the array is ``wrapped`` in an object that has another list of rows behind it.
    """
    text, at, line, ended = head, start + 1, head.count("\n", 0, start + 1) + 1, False
    need_comma, number, last = False, 0, 0

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
            _check_end(text[at + 1 :], chunks, label, wrapped=wrapped)
            return
        if at < len(text) and need_comma and array:
            raise refuse("a comma or the closing bracket is missing")
        try:
            if at == len(text):
                raise json.JSONDecodeError("cut off", text, at)
            value, end = DECODER.raw_decode(text, at)
            if end == len(text) and not ended and not isinstance(value, dict | list):
                raise json.JSONDecodeError("cut off", text, end)  # a number may go on in the next chunk
        except DuplicateKey as error:
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
        number += 1
        yield Row(Place(label, number, "row") if line == last else Place(label, line), value)
        last = line = line + text.count("\n", at, end)
        at, need_comma = end, True


# -- text, csv, tables ------------------------------------------------------------------------------------------------


def _text_rows(stream: IO[bytes], label: str, whole: str) -> Iterator[Row]:
    """Raw text: what one row is, is the person's to say."""
    parts: list[str] = []
    first = size = 0
    for number, line, length in _text_lines("", _decoded(stream, label)):
        blank = line is not None and not line.strip()
        if first and (whole == "text-lines" or (blank and whole != "text-whole")):
            yield _text_row(label, first, parts, size)
            parts, first, size = [], 0, 0
        if blank and not first:
            continue
        first, size = first or number, size + length + 1
        if line is None or size > ROW_LIMIT:
            parts.clear()
        else:
            parts.append(line.removesuffix("\r"))
    if first:
        yield _text_row(label, first, parts, size)


def _text_row(label: str, first: int, parts: list[str], size: int) -> Row:
    place = Place(label, first)
    if size > ROW_LIMIT:
        return Row(place, None, f"the text has {size:,} characters; one row may have {ROW_LIMIT:,}")
    return Row(place, {"text": "\n".join(parts).rstrip()})


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
    if any("\udc80" <= letter <= "\udcff" for letter in first):
        raise UserError(f"{label}:1: the header is no UTF-8", rule="Data files are UTF-8.", way_out=TO_UTF8)
    if not any(header):
        raise UserError(f"data {label} is empty", rule="A csv file begins with a line that names its columns.")
    twice = [name for name, count in Counter(header).items() if count > 1]
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
