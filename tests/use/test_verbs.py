"""The verbs as people type them, on one adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slimtune.cli import slimtune_command
from slimtune.errors import GuardStop, UserError
from slimtune.use import load
from slimtune.use.load import Opened


def _run(*words: object) -> None:
    slimtune_command.main(args=[str(word) for word in words], standalone_mode=False)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Say hello.", "completion": "zzz"}) + "\n")
    return file


@pytest.fixture
def opened_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs share one loaded model: loading is tested elsewhere and takes most of the time."""
    monkeypatch.setattr(load, "open_model", lambda *args, **kwargs: opened)


@pytest.mark.usefixtures("opened_once")
def test_generate_eval_and_compare(
    adapter: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run("generate", adapter, rows, "-o", tmp_path / "out.jsonl", "--max-new-tokens", 4, "--with-base")
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {"reply", "base_reply", "reference"} <= row.keys()
    _run("generate", adapter, rows, "-o", tmp_path / "other.jsonl", "--part", "2/2")
    assert not (tmp_path / "other.jsonl").read_text(), "the first of two parts has the one row"
    with pytest.raises(UserError, match="--part 3/2"):
        _run("generate", adapter, rows, "-o", tmp_path / "third.jsonl", "--part", "3/2")
    capsys.readouterr()
    _run("eval", adapter, rows, "--json", "--with-base")
    measured = json.loads(capsys.readouterr().out)
    assert measured["tuned"]["loss"]["value"] != measured["base"]["loss"]["value"]
    with pytest.raises(GuardStop, match="score is 0"):
        _run("compare", adapter, rows, "--no-general", "--max-new-tokens", 4, "-o", tmp_path, "--fail-if", "score<0.5")
    shown = capsys.readouterr().out
    assert "held-out" in shown
    assert "0 better · 0 worse · 1 same" in shown
    assert json.loads((tmp_path / "compare.json").read_text())["numbers"]["score"] == 0
    assert "Say hello." in (tmp_path / "compare.html").read_text()


def test_merge_export_and_push(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("merge", adapter, "-o", tmp_path / "merged", "--no-parity")
    assert len(load_file(tmp_path / "merged" / "model.safetensors")) == 272
    _run("export", adapter, "--to", "vllm")
    assert f"={adapter} " in capsys.readouterr().out
    _run("export", adapter, "--to", "mlx", "--base", "/where it/lies now")
    assert f"slimtune merge {adapter} -o merged --base '/where it/lies now'\n" in capsys.readouterr().out
    _run("push", adapter, tmp_path / "published")
    assert (tmp_path / "published" / "README.md").is_file()
