"""Every kind of file gives the same rows, each with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slimtune.data import sources
from slimtune.data.sources import Place, parse_source, read_rows
from slimtune.errors import UserError

ROWS = [{"instruction": f"Say {n},\nplease", "output": f'"{n}" — 船'} for n in range(5)]


def as_jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    made: bytes = sink.getvalue().to_pybytes()
    return made


# name: (content, the places of its rows)
LINES = [f"rows.jsonl:{n}" for n in range(1, 6)]
KINDS: dict[str, tuple[Callable[[], bytes], list[int], str]] = {
    "rows.json": (lambda: json.dumps(ROWS, indent=1).encode(), [2, 6, 10, 14, 18], "line"),
    "rows.jsonl": (as_jsonl, [1, 2, 3, 4, 5], "line"),
    "lines.json": (as_jsonl, [1, 2, 3, 4, 5], "line"),
    "objects.json": (lambda: "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(), [1, 5, 9, 13, 17], "line"),
    "rows.csv": (lambda: as_csv(","), [2, 4, 6, 8, 10], "line"),
    "semicolons.csv": (lambda: as_csv(";"), [2, 4, 6, 8, 10], "line"),
    "rows.tsv": (lambda: as_csv("\t"), [2, 4, 6, 8, 10], "line"),
    "rows.parquet": (as_parquet, [1, 2, 3, 4, 5], "row"),
}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
def test_rows_and_places(tmp_path: Path, name: str, ending: str) -> None:
    make, numbers, unit = KINDS[name]
    content = {"": lambda c: c, ".gz": gzip.compress, ".zst": zstd}[ending](make())
    file = tmp_path / (name + ending)
    file.write_bytes(content)
    rows = list(read_rows(parse_source(str(file))))
    assert [row.value for row in rows] == ROWS
    assert [row.place for row in rows] == [Place(file.name, number, unit) for number in numbers]
    assert [row.refused for row in rows] == [""] * 5


def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    for chunk in (1, 7, 64):
        monkeypatch.setattr(sources, "_CHUNK", chunk)
        assert [row.value for row in read_rows(parse_source(str(file)))] == ROWS
        assert [row.place.number for row in read_rows(parse_source(str(file)))] == [2, 6, 10, 14, 18]


def test_a_line_over_the_limit_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROW_LIMIT", 1000)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"text": "x" * 5000}) + "\n" + json.dumps(ROWS[1]))
    rows = list(read_rows(parse_source(str(file))))
    assert [row.refused for row in rows] == ["", "the line has 5,012 characters; one row may have 1,000", ""]
    assert [row.place.number for row in rows] == [1, 2, 3]


def test_a_sample_is_seeded_and_in_file_order(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(1000)))
    taken = [row.place.number for row in read_rows(parse_source(f"{file}#50"), seed=1)]
    assert len(taken) == 50
    assert taken == sorted(taken)
    assert taken == [row.place.number for row in read_rows(parse_source(f"{file}#50"), seed=1)]
    assert taken != [row.place.number for row in read_rows(parse_source(f"{file}#50"), seed=2)]
    assert len(list(read_rows(parse_source(f"{file}#5000"), seed=2))) == 1000


def test_notation(tmp_path: Path) -> None:
    file = tmp_path / "a#b*c.jsonl"
    file.write_text("{}")
    assert parse_source(str(file)).path == file
    source = parse_source(f"{file}#20*1.5")
    assert (source.path, source.sample, source.weight) == (file, 20, 1.5)
    assert parse_source("owner/name:test").name == "owner/name:test"
    with pytest.raises(UserError, match=r"\*0 is no weight"):
        parse_source(f"{file}*0")


def test_hub_rows_come_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(repo: str, split: str) -> datasets.Dataset:
        asked.append((repo, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows(parse_source("owner/name:test")))
    assert asked == [("owner/name", "test")]
    assert [row.value for row in rows] == ROWS
    assert str(rows[1].place) == "owner/name:test row 2"


def test_a_hub_set_that_cant_be_had_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(repo: str, split: str) -> datasets.Dataset:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"^hub data 'owner/name' can't be loaded: no network\nA hub id is"):
        list(read_rows(parse_source("owner/name")))
