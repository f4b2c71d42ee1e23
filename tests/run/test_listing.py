"""A run's line is told from its own files, whatever became of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slimtune.cli import slimtune_command
from slimtune.config import Config
from slimtune.run.folder import RunFolder
from slimtune.run.listing import list_runs


@pytest.fixture
def runs(tmp_path: Path, finished_run: RunFolder) -> Path:
    """A finished run, one that was stopped after 5 steps, one that is damaged, and folders that are none."""
    folder = tmp_path / "runs"
    shutil.copytree(finished_run.path, folder / "deep" / "finished")
    stopped = RunFolder(folder / "stopped")
    stopped.path.mkdir()
    stopped.write_config(Config.make(model="a/b", data="rows/chats.jsonl"))
    facts = {"created": "2020-01-01T10:00:00+00:00", "base": {"model": "a/b"}}
    stopped.write_json(stopped.facts_file, facts)
    for step in range(1, 6):
        stopped.append_metrics({"step": step, "loss": 1.0})
    damaged = RunFolder(folder / "damaged")
    shutil.copytree(stopped.path, damaged.path)
    damaged.facts_file.write_text("{")
    (folder / "other").mkdir()
    (folder / "other" / "config.yaml").write_text("model: x\n")
    return folder


def test_each_run_is_told_as_far_as_it_came(runs: Path, finished_run: RunFolder) -> None:
    lines = {Path(line.path).name: line for line in list_runs(runs)}
    assert lines.keys() == {"finished", "stopped", "damaged"}
    facts = finished_run.read_json(finished_run.facts_file)
    done = lines["finished"]
    assert (done.state, done.steps, done.adapter_bytes) == ("done", 12, facts["adapter"]["file_bytes"])
    assert (done.held_out_before, done.held_out_after) == tuple(
        facts["verdict"][at]["value"] for at in ("start", "end")
    )
    stopped = lines["stopped"]
    assert (stopped.state, stopped.steps, stopped.model, stopped.data) == (
        "unfinished",
        5,
        "a/b",
        ("rows/chats.jsonl",),
    )
    assert lines["damaged"].state == "damaged"
    assert "facts.json" in str(lines["damaged"].problem)
    assert [Path(line.path).name for line in list_runs(runs / "stopped")] == ["stopped"]


@pytest.mark.parametrize(("sort", "first"), [("when", "finished"), ("name", "damaged"), ("loss", "finished")])
def test_they_are_sorted(runs: Path, sort: str, first: str) -> None:
    assert Path(list_runs(runs, sort)[0].path).name == first


@pytest.mark.parametrize(
    "told",
    [
        {"created": 5}, {"created": "soon"}, {"base": {"model": ["a/b"]}}, {"training": {"steps": "5"}},
        {"training": {"steps": 5, "eval_loss": {}}}, {"adapter": {"file_bytes": 10**400}},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_kind_is_damage(
    runs: Path, told: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended the verb for all runs of the folder."""
    stopped = RunFolder(runs / "stopped")
    stopped.write_json(stopped.facts_file, {"created": "2020-01-01T10:00:00+00:00", **told})
    assert {Path(line.path).name: line.state for line in list_runs(runs)}["stopped"] == "damaged"
    slimtune_command.main(args=["runs", str(runs)], standalone_mode=False)
    assert "stopped" in capsys.readouterr().out


def test_the_verb_prints_them(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        slimtune_command.main(args=["runs", *words], standalone_mode=False)
        return capsys.readouterr().out

    table = said(str(runs))
    for part in ("finished", "chats.jsonl", " 5 ", "unfinished", "damaged", "2020-01-01"):
        assert part in table
    assert len(json.loads(said(str(runs), "--json"))) == 3
