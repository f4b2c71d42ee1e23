"""Standard input as data is kept in a file that says the same."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slimtune.config import Config
from slimtune.data.sources import parse_source, read_rows
from slimtune.data.stdin import keep_stdin
from slimtune.errors import UserError

ROWS = [{"instruction": "Hi", "output": f"It is {n}."} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        json.dumps(ROWS, indent=1).encode(),
        gzip.compress(LINES),
        parquet(),
        b"instruction,output\n" + b"".join(f"Hi,It is {n}.\n".encode() for n in range(3)),
        b"instruction\toutput\n" + b"".join(f"Hi\tIt is {n}.\n".encode() for n in range(3)),
    ],
    ids=["lines", "array", "gzip", "parquet", "csv", "tsv"],
)
def test_what_is_piped_is_kept_and_told_by_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    pipe(monkeypatch, content)
    config = keep_stdin(Config.make(data=("other.jsonl", "-#2*3")), tmp_path / "kept")
    assert config.data[0] == "other.jsonl"
    source = parse_source(config.data[1])
    assert (source.sample, source.weight) == (2, 3.0)
    assert source.found.files[0].path.read_bytes() == content
    assert len(list(read_rows(source))) == 2
    assert [row.value for row in read_rows(parse_source(str(source.found.files[0].path)))] == ROWS


def test_text_is_piped_with_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"One, two.\nThree.\n")
    config = keep_stdin(Config.make(data="-", format="text-lines"), tmp_path)
    found = read_rows(parse_source(config.data[0]), whole=config.format)
    assert [row.value["text"] for row in found] == ["One, two.", "Three."]


def test_what_cannot_be_piped_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    with pytest.raises(UserError, match="is empty"):
        keep_stdin(Config.make(data="-"), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    pipe(monkeypatch, b"Once there was a door.")
    with pytest.raises(UserError, match=r"neither JSON nor a table(.|\n)*--format text"):
        keep_stdin(Config.make(data="-"), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    with pytest.raises(UserError, match="stands twice"):
        keep_stdin(Config.make(data="-", eval="-"), tmp_path)
    with pytest.raises(UserError, match="can't be read here"):
        parse_source("-")
    config = Config.make(data="a.jsonl")
    assert keep_stdin(config, tmp_path) is config
