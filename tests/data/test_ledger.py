"""The account of every row stays readable: of many of a kind the first are named, and the others counted."""

from __future__ import annotations

import io
import json

import pytest

from slimtune.data import ledger as module
from slimtune.data.ledger import Ledger
from slimtune.data.sources import Place


def test_many_of_a_kind_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SINGLY", 3)
    file = io.StringIO()
    ledger = Ledger(file)
    for number in range(1, 11):
        ledger.drop(Place("a.jsonl", number), "shape", "no known shape", "x")
        ledger.drop(Place("b.jsonl", number), f"rule {number}", "another")
    ledger.finish()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    mine = [line for line in lines if line["rule"] == "shape"]
    assert [line["line"] for line in mine] == [1, 2, 3, 4]
    assert mine[2]["reason"] == "no known shape"
    assert mine[3] == {
        "file": "a.jsonl", "line": 4, "action": "dropped", "rule": "shape", "rows": 7, "to": 10,
        "reason": "as the 3 above",
    }  # fmt: skip
    assert len(lines) == 14
    assert ledger.rows_dropped == 20
