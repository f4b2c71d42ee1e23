"""``slimtune data`` as a person types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slimtune.cli.options import config_from_flags

RunHere = Callable[..., Any]
GOOD = [{"instruction": f"Say {n} & <more>", "output": f"It is {n}."} for n in range(3)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return file


def test_the_table_the_page_and_the_ledger(run_here: RunHere, rows: Path, tmp_path: Path) -> None:
    page, ledger = tmp_path / "page.html", tmp_path / "ledger.jsonl"
    done = run_here("data", str(rows), "--model", "smollm2-135m", "--html", str(page), "--ledger", str(ledger))
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("alpaca (3)", "3 in = 3 trained + 0 dropped", "It is 1.<|im_end|>", "training may begin"):
        assert words in done.stdout
    text = page.read_text(encoding="utf-8")
    assert "<mark>It is 1.&lt;|im_end|&gt;</mark>" in text
    assert "Say 1 &amp; &lt;more&gt;" in text
    assert "://" not in text  # self-contained
    HTMLParser().feed(text)
    assert ledger.read_text() == ""


def test_what_a_row_holds_moves_no_terminal(run_here: RunHere, rows: Path) -> None:
    turns = [{"role": "user", "content": "A\x1b[2J"}, {"role": "assistant", "content": "B\u202e[/b]\x9b1m"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    done = run_here("data", str(rows), "--model", "smollm2-135m")
    assert "A\\x1b[2J" in done.stdout
    assert "B\\x202e[/b]\\x9b1m" in done.stdout
    assert not {"\x1b", "\x9b", "\u202e"} & set(done.stdout)


def test_json_has_the_facts_and_the_sample(run_here: RunHere, rows: Path) -> None:
    done = run_here("data", str(rows), "--model", "smollm2-135m", "--json")
    facts = json.loads(done.stdout)
    assert (facts["rows"], facts["rows_trained"], facts["refused"]) == (3, 3, None)
    assert facts["sample"]["place"] == "rows.jsonl:2"
    assert [s["text"] for s in facts["sample"]["segments"] if s["supervised"]] == ["It is 1.<|im_end|>"]
    assert facts["packs"]["tokens"] == 192  # three rows are less than the 2,048 of --max-length


def test_refused_data_is_shown_and_exits_with_2(run_here: RunHere, rows: Path) -> None:
    with rows.open("a") as file:
        file.write('{"instruction": "a", "output": null}\n')
    done = run_here("data", str(rows), "--model", "smollm2-135m")
    assert done.returncode == 2
    assert "4 in = 3 trained + 1 dropped" in done.stdout
    assert "rows.jsonl:4, field 'output': null where text belongs" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(run_here("data", str(rows), "--model", "smollm2-135m", "--json").stdout)["refused"]


def test_mistakes_are_one_message(run_here: RunHere, rows: Path) -> None:
    model = rows.with_name("model")
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    for words, message in (
        ([], "no data given"),
        ([str(model), str(rows)], "That is a model: --model"),
        ([str(rows.with_name("rowz.jsonl")), "--model", "smollm2-135m"], "Did you mean"),
        ([str(rows), "--model", "smollm2-135m", "--overlong", "cut"], "'drop', 'error', 'split', 'keep-end'"),
        ([str(rows), "--model", "smollm2-135m", "--map", "output"], "It is written name=value."),
        ([str(rows), "--model", "smollm2-135m", "--html", "/nowhere/page.html"], "can't be written"),
    ):
        done = run_here("data", *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_several_columns_may_stand_in_one_map() -> None:
    flags = {"map": ("instruction=frage,output=antwort, lang", "input=kontext"), "lora_r": None}
    assert config_from_flags(None, flags).map == {
        "instruction": "frage", "output": "antwort, lang", "input": "kontext"
    }  # fmt: skip
