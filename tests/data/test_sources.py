"""Every kind of file, folder and pattern gives the same rows, each with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slimtune.data import readers, tables
from slimtune.data.conversation import normalise
from slimtune.data.readers import file_rows
from slimtune.data.rows import RowRefused
from slimtune.data.sources import Place, content_hash, parse_source, read_rows
from slimtune.errors import UserError
from slimtune.words import catalogue

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


def as_arrow(writer: Callable[..., Any]) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with writer(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    made: bytes = sink.getvalue().to_pybytes()
    return made


# name: (content, the places of its rows, each one's unit or that of all)
LINES = [f"rows.jsonl:{n}" for n in range(1, 6)]
KINDS: dict[str, tuple[Callable[[], bytes], list[int], str]] = {
    "rows.json": (lambda: json.dumps(ROWS, indent=1).encode(), [2, 6, 10, 14, 18], "line"),
    "rows.jsonl": (as_jsonl, [1, 2, 3, 4, 5], "line"),
    "lines.json": (as_jsonl, [1, 2, 3, 4, 5], "line"),
    "wrapped.json": (
        lambda: json.dumps({"version": [1, {"a": "]"}], "data": ROWS, "more": 1}, indent=1).encode(),
        [9, 13, 17, 21, 25], "line",
    ),
    "one-line.json": (lambda: json.dumps({"rows": ROWS}).encode(), [1, 2, 3, 4, 5], "line row row row row"),
    "two-to-a-line.json": (
        lambda: b"[" + b",\n".join(json.dumps(ROWS[at : at + 2])[1:-1].encode() for at in (0, 2, 4)) + b"]",
        [1, 2, 2, 4, 3], "line row line row line",
    ),
    "objects.json": (lambda: "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(), [1, 5, 9, 13, 17], "line"),
    "rows.csv": (lambda: as_csv(","), [2, 4, 6, 8, 10], "line"),
    "semicolons.csv": (lambda: as_csv(";"), [2, 4, 6, 8, 10], "line"),
    "rows.tsv": (lambda: as_csv("\t"), [2, 4, 6, 8, 10], "line"),
    "rows.parquet": (as_parquet, [1, 2, 3, 4, 5], "row"),
    "stream.arrow": (lambda: as_arrow(pa.ipc.new_stream), [1, 2, 3, 4, 5], "row"),
    "file.feather": (lambda: as_arrow(pa.ipc.new_file), [1, 2, 3, 4, 5], "row"),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
def test_rows_and_places(tmp_path: Path, name: str, ending: str) -> None:
    make, numbers, named = KINDS[name]
    units = named.split() * (5 // len(named.split()))
    content = {"": lambda c: c, ".gz": gzip.compress, ".zst": zstd}[ending](make())
    file = tmp_path / (name + ending)
    file.write_bytes(content)
    rows = list(read_rows(parse_source(str(file))))
    assert [row.value for row in rows] == ROWS
    assert [row.place for row in rows] == [Place(file.name, *at) for at in zip(numbers, units, strict=True)]
    assert [row.refused for row in rows] == [""] * 5


def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    for chunk in (1, 7, 64):
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        assert [row.value for row in read_rows(parse_source(str(file)))] == ROWS
        assert [row.place.number for row in read_rows(parse_source(str(file)))] == [2, 6, 10, 14, 18]


def test_a_line_over_the_limit_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROW_LIMIT", 1000)
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
    assert parse_source(str(file)).found.files[0].path == file
    source = parse_source(f"{file}#20*1.5")
    assert (source.found.files[0].path, source.sample, source.weight) == (file, 20, 1.5)
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


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (None, "hub data 'owner/name' isn't in the cache on this machine"),  # by the library itself, without a network
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"), "the hub has no data"),
    ],
)
def test_what_the_hubs_library_says_of_a_missing_set_is_said_in_ones_own_words(
    raised: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(repo: str, split: str) -> datasets.Dataset:
        assert raised is not None
        raise raised

    if raised is None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=said) as refused:
        list(read_rows(parse_source("owner/name")))
    assert all(told is not None for told in map(catalogue().told, str(refused.value).split("\n")))


# -- raw text ---------------------------------------------------------------------------------------------------------

BOOK = "\n\nThe old door\nstands by the river.\n \n\nIn winter the garden is white.\r\n"


@pytest.mark.parametrize(
    ("whole", "rows"),
    [
        ("text", [(3, "The old door\nstands by the river."), (7, "In winter the garden is white.")]),
        ("text-lines", [(3, "The old door"), (4, "stands by the river."), (7, "In winter the garden is white.")]),
        ("text-whole", [(3, "The old door\nstands by the river.\n \n\nIn winter the garden is white.")]),
    ],
)
def test_a_text_file_by_stretches_by_lines_and_whole(tmp_path: Path, whole: str, rows: list[tuple[int, str]]) -> None:
    file = tmp_path / "book.txt"
    file.write_text(BOOK, newline="")
    found = list(read_rows(parse_source(str(file)), whole=whole))
    assert [(row.place.number, row.value["text"]) for row in found] == rows


def test_a_text_over_the_limit_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROW_LIMIT", 100)
    file = tmp_path / "book.txt"
    file.write_text("a\n\n" + "b" * 60 + "\n" + "c" * 60 + "\nd\n\ne\n\n" + "f" * 500 + "\n\ng\n")
    found = list(read_rows(parse_source(str(file))))
    assert [row.value and row.value["text"] for row in found] == ["a", None, "e", None, "g"]
    assert found[1].refused == "the text has 124 characters; one row may have 100"


# -- folders and patterns ---------------------------------------------------------------------------------------------


def write(file: Path, *rows: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def places(name: str) -> list[str]:
    return [str(row.place) for row in read_rows(parse_source(name))]


def test_a_folders_files_are_rows_but_for_those_named_as_held_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "eval_1.jsonl", "x-test.jsonl", "contest.jsonl", ".hidden.jsonl"):
        write(tmp_path / "rows" / name, {"text": name})
    (tmp_path / "rows" / "LICENSE.txt").write_text("not data")
    folder = str(tmp_path / "rows")
    assert places(folder) == ["a.jsonl:1", "b.jsonl:1", "contest.jsonl:1"]
    assert parse_source(folder).found.left_out == ("eval_1.jsonl", "x-test.jsonl")
    assert places(f"{folder}:test") == ["x-test.jsonl:1"]
    assert places(f"{folder}:valid*2") == ["eval_1.jsonl:1"]
    with pytest.raises(UserError, match=r"has no part 'nope'\nIt has test, valid"):
        parse_source(f"{folder}:nope")
    for name in ("a", "b", "contest"):
        (tmp_path / "rows" / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match="has no part 'train'"):
        parse_source(folder)


def test_a_folder_as_hubs_have_it_holds_its_files_further_down(tmp_path: Path) -> None:
    write(tmp_path / "set" / "data" / "train-00000-of-00001.jsonl", {"text": "a"})
    write(tmp_path / "set" / "data" / "test-00000-of-00001.jsonl", {"text": "b"})
    (tmp_path / "set" / "README.md").write_text("about it")
    assert places(str(tmp_path / "set")) == ["data/train-00000-of-00001.jsonl:1"]
    (tmp_path / "set" / "LICENSE.txt").write_text("not data")
    assert places(str(tmp_path / "set")) == ["data/train-00000-of-00001.jsonl:1"]
    write(tmp_path / "set" / "top.jsonl", {"text": "c"})
    assert places(str(tmp_path / "set")) == ["top.jsonl:1"]
    below = ("data/test-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl")
    assert parse_source(str(tmp_path / "set")).found.left_out == below
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("One.\n\nTwo.")
    assert places(str(tmp_path / "texts")) == ["a.txt:1", "a.txt:3"]


def test_a_pattern_is_its_files_in_order_and_their_bytes_are_its_hash(tmp_path: Path) -> None:
    for name in ("1/a.jsonl", "2/a.jsonl", "2/b.jsonl"):
        write(tmp_path / name, {"text": name})
    assert places(f"{tmp_path}/**/*.jsonl") == ["1/a.jsonl:1", "2/a.jsonl:1", "2/b.jsonl:1"]
    assert places(f"{tmp_path}/?/a.jsonl#1*2")[0].endswith("a.jsonl:1")
    pattern = f"{tmp_path}/2/[ab].jsonl"
    before = content_hash(parse_source(pattern))
    assert content_hash(parse_source(f"{tmp_path}/2/a.jsonl")) != before
    write(tmp_path / "2" / "b.jsonl", {"text": "other"})
    changed = content_hash(parse_source(pattern))
    (tmp_path / "2" / "b.jsonl").unlink()
    assert len({before, changed, content_hash(parse_source(pattern))}) == 3
    with pytest.raises(UserError, match="no file matches"):
        parse_source(f"{tmp_path}/*.csv")
    with pytest.raises(UserError, match="is no pattern"):
        parse_source(f"{tmp_path}/**a.csv")


def test_a_sample_is_drawn_from_all_files_of_a_folder(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.jsonl", *({"text": str(row)} for row in range(20)))
    taken = places(f"{tmp_path}#30")
    assert len(taken) == 30
    assert len({place.split(":")[0] for place in taken}) == 5


def test_what_datasets_saved_is_read_and_its_json_columns_are_decoded(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                      {"role": "assistant", "content": None, "tool_calls": [
                          {"function": {"name": "f", "arguments": {"at": None, "of": [1, "a"]}}}]},
                      {"role": "tool", "content": "r"}, {"role": "assistant", "content": "Hello."}]},
    ]  # fmt: skip
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "saved/train", "rows.parquet"):
        assert [row.value for row in read_rows(parse_source(str(tmp_path / name)))] == rows
    assert len(places(f"{tmp_path}/saved:test")) == 1
    with pytest.raises(UserError, match=r"has no part 'valid'\nIt has train, test"):
        parse_source(f"{tmp_path}/saved:valid")


def test_a_tables_nulls_in_calls_are_absent_keys_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(**arguments: Any) -> dict[str, Any]:
        asked = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        return {"messages": [{"role": "user", "content": "Hi", "tool_calls": None}, asked]}

    rows = [call(lat=1.0), call(city="Brest")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    for name in (f"{tmp_path}/rows.parquet", "owner/name"):
        found = list(read_rows(parse_source(name)))
        calls = [normalise(row.value).messages[1]["tool_calls"][0]["function"]["arguments"] for row in found]
        assert calls == [{"lat": 1.0}, {"city": "Brest"}]
        assert [row.repairs for row in found] == [("absent-keys",)] * 2


def test_maps_of_a_table_are_objects(tmp_path: Path) -> None:
    arguments = [[("at", "quay")], [], [("at", "quay"), ("at", "sea")], None]
    kind = pa.struct([("name", pa.string()), ("parameters", pa.map_(pa.string(), pa.string()))])
    rows = pa.array([[{"name": "f", "parameters": each}] for each in arguments], pa.list_(kind))
    pq.write_table(pa.table({"text": ["a"] * 4, "tools": rows}), tmp_path / "rows.parquet")
    one, two, three, four = read_rows(parse_source(f"{tmp_path}/rows.parquet"))
    assert one.value["tools"] == [{"name": "f", "parameters": {"at": "quay"}}]
    assert two.value["tools"] == [{"name": "f", "parameters": {}}]
    assert (three.place.number, three.refused) == (3, "a key stands twice in an object")
    assert four.value["tools"] == [{"name": "f"}]


INFO = {
    "plain": {"file_name": "plain.json"},
    "mine": {"file_name": "mine.json", "columns": {"prompt": "frage", "response": "antwort", "history": "davor"}},
    "chat": {
        "file_name": "chat.json", "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "rule"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "guest", "assistant_tag": "host"},
    },
    "better": {"file_name": "better.json", "ranking": True,
               "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    "seen": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "pics"}},
    "raw": {"file_name": "raw.jsonl", "columns": {"prompt": "body"}},
    "far": {"hf_hub_url": "owner/name", "split": "extra"},
    "part": {"hf_hub_url": "owner/name", "subset": "main"},
    "gone": {"file_name": "gone.json"},
    "script": {"script_url": "belle_multiturn"},
}  # fmt: skip


@pytest.fixture
def described(tmp_path: Path) -> str:
    write(tmp_path / "dataset_info.json", INFO)
    write(tmp_path / "plain.json", {"instruction": "Hi", "input": "", "output": "Hello."})
    write(tmp_path / "mine.json", {"frage": "Hi", "antwort": "Hello.", "davor": [["a", "b"]], "output": "another"})
    talk = [{"who": "guest", "says": "Hi"}, {"who": "host", "says": "Hello."}]
    write(tmp_path / "chat.json", {"rule": "Be brief.", "talk": talk, "pics": ["a.jpg"]})
    write(tmp_path / "better.json", {"q": "Hi", "good": "Hello.", "bad": "No."})
    write(tmp_path / "raw.jsonl", {"body": "A page.", "output": "no reply"})
    return str(tmp_path)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("plain", [("user", "Hi"), ("assistant", "Hello.")]),
        ("mine", [("user", "a"), ("assistant", "b"), ("user", "Hi"), ("assistant", "Hello.")]),
        ("chat", [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")]),
        ("better", [("user", "Hi"), ("assistant", "Hello.")]),
    ],
)
def test_llama_factorys_data_sets_are_read_as_they_are_described(
    described: str, part: str, expected: list[tuple[str, str]]
) -> None:
    (row,) = read_rows(parse_source(f"{described}:{part}"))
    made = normalise(row.value, prefer="chosen" if part == "better" else None)
    assert [(message["role"], message["content"]) for message in made.messages] == expected


def test_what_a_description_says_of_pictures_hubs_and_raw_text_is_heard(described: str) -> None:
    with pytest.raises(RowRefused, match="a column of images"):
        normalise(next(read_rows(parse_source(f"{described}:seen"))).value)
    assert normalise(next(read_rows(parse_source(f"{described}:raw"))).value).text == "A page."
    assert parse_source(f"{described}:far").name == "owner/name:extra"
    with pytest.raises(UserError, match="runs no data set's script"):
        parse_source(f"{described}:script")
    with pytest.raises(UserError, match="is main of a hub's data set"):
        parse_source(f"{described}:part")
    with pytest.raises(UserError, match=r"names gone\.json, which isn't there"):
        parse_source(f"{described}:gone")
    with pytest.raises(UserError, match=r"holds 10 data sets: plain, mine, .*\nFOLDER:NAME takes one"):
        parse_source(described)
    one, other = (content_hash(parse_source(f"{described}:{part}")) for part in ("chat", "seen"))
    assert one != other


def test_a_second_list_of_rows_in_a_file_is_not_left_out_unsaid(tmp_path: Path) -> None:
    file = tmp_path / "parts.json"
    file.write_text(json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}))
    with pytest.raises(UserError, match="a second list of rows, 'test'"):
        list(read_rows(parse_source(str(file))))
    for whole in ({"train": [{"text": "a"}], "n": 1, "test": [{"text": "b"}]},
                  {"test": [{"text": "b"}], "n": [1], "train": [{"text": "a"}]}):  # fmt: skip
        file.write_text(json.dumps(whole))
        with pytest.raises(UserError, match="a second list of rows, 'test'"):
            list(read_rows(parse_source(str(file))))


@pytest.mark.parametrize("chunk", [12, 2**20])
@pytest.mark.parametrize("behind", ['[{"text": "b"}]', "{}", "x", "]"])
@pytest.mark.parametrize("before", ['[{"text": "a"}]', '{"rows": [{"text": "a"}], "n": 1}', '{"rows": [{"text": "a"}]'])
def test_what_stands_behind_a_list_of_rows_is_not_left_out_unsaid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, behind: str, chunk: int
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    file = tmp_path / "rows.json"
    file.write_text(f"{before} {behind}", encoding="utf-8")
    with pytest.raises(UserError, match="isn't read stands behind its list of rows"):
        list(read_rows(parse_source(str(file))))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_list_of_turns_may_stand_in_each_line(tmp_path: Path, ending: str) -> None:
    turns = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}] for n in range(3)]
    file = tmp_path / f"rows.{ending}"
    file.write_text("\n".join(map(json.dumps, turns)) + "\n", encoding="utf-8")
    rows = list(read_rows(parse_source(str(file))))
    assert [row.value for row in rows] == turns
    assert [row.place.number for row in rows] == [1, 2, 3]


def test_a_small_parquet_with_a_large_row_costs_that_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_LIMIT", 2**16)
    file = tmp_path / "rows.parquet"
    nulls = pa.array([[None] * (2**16 + 1), []], pa.list_(pa.null()))
    pq.write_table(pa.table({"text": ["a", "b"], "more": nulls}), file)
    assert file.stat().st_size < 10_000
    rows = list(file_rows(file, "rows.parquet"))
    assert [bool(row.refused) for row in rows] == [True, False]
    assert "one row may have" in rows[0].refused
    assert rows[1].value["text"] == "b"


def test_a_dictionarys_value_is_not_unpacked_for_many_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROW_LIMIT", 2**16)
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["x" * 100_000] * 300}), file)
    assert file.stat().st_size < 110_000
    with file.open("rb") as stream:
        assert next(iter(tables._parquet(stream))).num_rows <= 16


def test_what_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet.gz"
    with gzip.open(file, "wb") as out:
        for _ in range(200):
            out.write(bytes(2**20))
    with pytest.raises(UserError, match="unpacks to more than"):
        list(file_rows(file, "rows.parquet.gz"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_many_columns_are_counted_once(name: str, tmp_path: Path) -> None:
    columns = [f"c{number}" for number in range(20_000)]
    again = [*columns, columns[-1]]
    file = tmp_path / name
    if name.endswith("csv"):
        file.write_text(",".join(again) + "\n" + ",".join("1" for _ in again) + "\n")
        with pytest.raises(UserError, match="'c19999' stands twice"):
            list(file_rows(file, name))
    else:
        file.write_text("{" + ",".join(f'"{column}": 1' for column in again) + "}\n")
        assert "'c19999' stands twice" in next(iter(file_rows(file, name))).refused


def test_a_stretch_of_rows_that_hold_nothing_is_told_once(tmp_path: Path) -> None:
    """A million of them fit into two kilobytes."""
    file = tmp_path / "rows.parquet"
    empty = pa.nulls(500_000, pa.string())
    pq.write_table(pa.table({"text": pa.concat_arrays([empty, pa.array(["x"]), empty])}), file)
    rows = list(file_rows(file, file.name))
    assert sum(row.rows for row in rows) == 1_000_001
    assert [row.place.number for row in rows if row.value and row.value["text"]] == [500_001]
    assert len(rows) <= 2 + 256
    numbers = [row.place.number for row in rows]
    assert [at + row.rows for at, row in zip(numbers, rows, strict=True)] == [*numbers[1:], 1_000_002]
    sample = read_rows(parse_source(f"{file}#1000"), seed=3)
    assert sum(row.rows for row in sample) == 1000
