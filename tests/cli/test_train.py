"""How a run ends: what it says of the model that it made, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Done

RunHere = Callable[..., Done]


@pytest.mark.parametrize(
    ("rate", "code", "said"),
    [
        ("1e-2", 0, "better than before the training on 10 held-out documents"),
        ("500", 4, "WORSE than before the training on 10 held-out documents"),
    ],
)
def test_a_run_says_whether_the_model_is_better(
    run_here: RunHere, tiny_model: Path, requests_file: Path, tmp_path: Path, rate: str, code: int, said: str
) -> None:
    run = tmp_path / "run"
    done = run_here(
        "train", str(tiny_model), str(requests_file), "-o", str(run), "--learning-rate", rate, "--max-steps", "6",
        "--gradient-accumulation", "1", "--max-length", "128", "--lr-scheduler", "constant",
    )  # fmt: skip
    assert done.returncode == code
    assert said in " ".join(done.stderr.split())
    assert f"slimtune chat {run}" in done.stderr
    assert f"slimtune compare {run}" in done.stderr
    assert str(run / "report.html") in done.stderr
    assert "WORSE" in (run / "report.md").read_text() or code == 0
    verdict = json.loads((run / "facts.json").read_text())["verdict"]
    assert (verdict["change"]["low"] > 0) == (code == 4)
    if code == 4:
        assert verdict["suggestion"] == "--learning-rate 0.0002"
        assert run_here("explain", str(run)).returncode == 1
