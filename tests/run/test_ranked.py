"""Where a rank works that isn't the first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest

from slimtune.config import Config
from slimtune.ranks.group import Ranks
from slimtune.ranks.place import Place
from slimtune.run.ranked import new_folder

CONFIG = Config.make(model="model", data="rows.jsonl", output="run")


def hold(count: int) -> None:
    """A rank that is killed in the middle of its work."""
    with new_folder(Ranks(Place(count, count + 1)), CONFIG) as run:
        (run.path / "metrics.jsonl").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_rank_left_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = multiprocessing.get_context("fork").Process(target=hold, args=(3,))
    killed.start()
    killed.join()
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in ("slimtune-rank-notes", "slimtune-rank9.txt")]
    others[0].mkdir()
    others[1].write_text("mine")
    with new_folder(Ranks(Place(1, 3)), CONFIG) as one, new_folder(Ranks(Place(2, 3)), CONFIG) as two:
        assert one.path.is_dir()
        assert two.path.is_dir(), "those that work stay"
        assert not left.exists()
    assert sorted(tmp_path.iterdir()) == others
