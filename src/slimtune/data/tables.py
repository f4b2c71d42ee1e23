"""Rows of tables, one at a time, each with its place: parquet, Arrow, and what the datasets library holds."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from slimtune.data.rows import DECODER, ROW_LIMIT, Place, Row, without_absent
from slimtune.errors import UserError

__all__ = ["spooled", "table_file", "table_rows"]

_BATCH = 256
_CHUNK = 2**20
_MOST_UNPACKED, _SPARE = 50, 64 * 2**20


class _Within(io.RawIOBase):
    """A file that is asked for no more than it has: Python sets aside whatever size a damaged one declares."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))


def table_file(stream: IO[bytes], label: str, kind: str) -> Iterator[Row]:
    """The rows of a parquet or Arrow file.

    Raises:
        UserError: It is none, or is cut off.
    """
    file = _Within(stream)
    try:
        yield from table_rows(_parquet(file) if kind == "parquet" else _arrow(file), label)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data {label} can't be read as {kind}: {first}", way_out="Get the file again.") from None


def _parquet(stream: io.RawIOBase) -> Iterator[pa.RecordBatch]:
    """Batches of at most :data:`_BATCH` rows; of fewer where one value may be large, for a dictionary's value is
    written once and unpacked for every row that names it."""
    file = pq.ParquetFile(stream)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    largest = max(
        (group.column(at).total_uncompressed_size for group in groups for at in range(group.num_columns)), default=0
    )
    yield from file.iter_batches(batch_size=max(1, min(_BATCH, 16 * ROW_LIMIT // max(1, largest))))


def _arrow(stream: io.RawIOBase) -> Iterator[pa.RecordBatch]:
    """Arrow has two forms: a file (feather), and a stream, which the datasets library saves.

    Both are taken as they lie on the disk: without a look at all of a batch, a broken one ends the process.
    """
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        reader = pa.ipc.open_file(stream)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pa.ipc.open_stream(stream)
    for batch in batches:
        batch.validate(full=True)
        yield batch


def table_rows(batches: Iterable[Any], label: str) -> Iterator[Row]:
    """The rows of Arrow's record batches or tables.

    Objects in tools and calls lose the nulls that stand for keys they haven't; columns of JSON text are decoded, and
    Arrow's maps are objects.

    Raises:
        UserError: Two columns have one name.
    """
    number = empty = 0

    def stretch() -> Row:
        return Row(Place(label, number - empty + 1, "row"), None, "the row is empty: null in every column", rows=empty)

    for batch in batches:
        twice = next((name for name, count in Counter(batch.schema.names).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"{label}: column {twice!r} stands twice", rule="Columns have names of their own.")
        coded = {field.name: field.type for field in batch.schema if _holds_json(field.type)}
        for part in _parts(batch):
            if all(column.null_count == part.num_rows for column in part.columns):  # a few bytes may hold millions
                number, empty = number + part.num_rows, empty + part.num_rows
                continue
            if empty:
                yield stretch()
                empty = 0
            if part.num_rows == 1 and (size := sum(map(_extent, part.columns))) > ROW_LIMIT:
                number += 1
                yield Row(Place(label, number, "row"), None, f"about {size:,} bytes; one row may have {ROW_LIMIT:,}")
                continue
            for row in _as_python(part):
                number += 1
                if isinstance(row, str):
                    yield Row(Place(label, number, "row"), None, row)
                    continue
                absent: list[str] = []
                value = without_absent(row, absent)
                for name, kind in coded.items():
                    value[name] = _json_decoded(value[name], kind)
                yield Row(Place(label, number, "row"), value, repairs=("absent-keys",) if absent else ())
    if empty:
        yield stretch()


def _as_python(part: Any) -> list[dict[str, Any] | str]:
    """The rows; of one that has no counterpart in Python, why: a key that stands twice, a date before our era."""
    try:
        made: list[dict[str, Any] | str] = part.to_pylist(maps_as_pydicts="strict")
    except (KeyError, ValueError) as error:
        if part.num_rows == 1:
            return ["a key stands twice in an object" if "duplicate" in str(error) else str(error)]
        return [row for at in range(part.num_rows) for row in _as_python(part.slice(at, 1))]
    return made


def _parts(batch: Any) -> Iterator[Any]:
    """A batch or table in parts that are bearable as Python's values: 256 rows, or single ones."""
    for start in range(0, batch.num_rows, _BATCH):
        part = batch.slice(start, _BATCH)
        if sum(map(_extent, part.columns)) <= ROW_LIMIT:
            yield part
        else:
            yield from (part.slice(at, 1) for at in range(part.num_rows))


def _extent(array: Any) -> int:
    """About the bytes that a column takes as Python's values: those of a null too, and a dictionary's at each row."""
    if isinstance(array, pa.ChunkedArray):
        return sum(map(_extent, array.chunks))
    kind, size = array.type, int(array.nbytes) + len(array)
    if isinstance(array, pa.ExtensionArray):
        return _extent(array.storage)
    if pa.types.is_dictionary(kind):
        return size + len(array) * int(array.dictionary.nbytes)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return size + _extent(array.flatten())
    if pa.types.is_struct(kind):
        return size + sum(map(_extent, array.flatten()))
    return size


def _holds_json(kind: pa.DataType) -> bool:
    inside = (kind.field(at).type for at in range(kind.num_fields))
    return isinstance(kind, pa.JsonType) or any(map(_holds_json, inside))


def _json_decoded(value: Any, kind: pa.DataType) -> Any:
    """A value whose parts of Arrow's JSON type, which is text, are what the text says."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError):
            return value  # refused with its field by whoever reads it
    if isinstance(value, list) and kind.num_fields:
        return [_json_decoded(item, kind.field(0).type) for item in value]
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {key: _json_decoded(item, kind.field(key).type) for key, item in value.items()}
    return value


def spooled(stream: IO[bytes], label: str, packed: int) -> IO[bytes]:
    """A compressed file of ``packed`` bytes, unpacked into an unnamed temporary one.

    Raises:
        UserError: It unpacks to so much that it isn't what it says it is: parquet and Arrow hardly pack any further.
    """
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the reader
    most = _MOST_UNPACKED * packed + _SPARE
    while chunk := stream.read(_CHUNK):
        plain.write(chunk)
        if plain.tell() > most:
            plain.close()
            raise UserError(
                f"data {label} unpacks to more than {_MOST_UNPACKED} times its size",
                rule="So much isn't unpacked into a temporary file.",
                way_out="Unpack it yourself, and give what comes out.",
            )
    plain.seek(0)
    return plain
