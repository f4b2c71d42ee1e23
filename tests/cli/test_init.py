"""init: three questions in a terminal and none without; what it writes is a config that `train` takes."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from slimtune.cli import init
from slimtune.cli.init import GOALS
from slimtune.config import Config, load_config
from tests.cli.conftest import Done


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows: all.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    return file


@pytest.mark.parametrize("goal", GOALS)
def test_what_is_told_isnt_asked(goal: str, run_here: Callable[..., Done], data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    words = ("init", "-o", str(file), "--data", str(data), "--model", "smollm2-135m", "--goal", goal)
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    assert f"slimtune train --config {file}" in done.stdout
    config = load_config(file)
    given = {"model": "smollm2-135m", "data": (str(data),), **GOALS[goal].keys}
    assert config.model_fields_set == given.keys()
    assert all(list(value) == list(getattr(config, key)) if isinstance(value, list | tuple)
               else value == getattr(config, key) for key, value in given.items())  # fmt: skip
    done = run_here(*words)
    assert (done.returncode, file.read_text()) == (2, file.read_text())
    assert "is there already" in done.stderr


def test_without_a_terminal_nothing_is_asked(run_here: Callable[..., Done], data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    done = run_here("init", "-o", str(file), "--data", str(data))
    assert done.returncode == 2
    assert "Without one, it is told: --model --goal" in done.stderr
    assert not file.exists()
    there = tmp_path / "file"
    there.touch()
    done = run_here("init", "-o", str(there / "run.yaml"), "--data", f"{data}l", "--model", "no", "--goal", "task")
    assert f"nothing can be written into {there}" in done.stderr, "before anything is asked"
    done = run_here("init", "-o", str(file), "--data", f"{data}l")
    assert "does not exist" in done.stderr or "here is none" in done.stderr


def test_a_terminal_is_asked_until_the_answers_hold(data: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    main = "from slimtune.cli import main; main()"
    command = [sys.executable, "-c", main, "init", "-o", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "COLUMNS": "80"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = ""
        # One answer a question: what is typed ahead would be read all the same.
        for answer in (f"{data}l", str(data), "7", "smollm", "1", "9", "nothing", "keep"):
            while not said.endswith("> "):
                said += os.read(ours, 4096).decode()
            os.write(ours, f"{answer}\n".encode())
            said += "\n"
        assert process.wait(60) == 0, said
        said += os.read(ours, 65_536).decode()
    os.close(ours)
    for line in (f"Did you mean {data}?", "A number from 1 to 2.", "Did you mean smollm2-135m?", "is none of these"):
        assert " ".join(line.split()) in " ".join(said.split()), said
    assert load_config(tmp_path / "run.yaml").model_dump(include={"model", "data", "rehearse"}) == {
        "model": "smollm2-135m",
        "data": (str(data),),
        **GOALS["keep"].keys,
    }


def test_what_trains_here_is_offered_first(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in (("bert", '{"model_type": "bert"}'), ("tiny", "")):
        snapshot = tmp_path / f"models--a--{name}" / "snapshots" / "1"
        shutil.copytree(tiny_model, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("1")
        if body:
            (snapshot / "config.json").write_text(body)
    answered: list[dict[str, str]] = []
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(init, "_chosen", lambda question, choices, check: answered.append(choices) or "a/tiny")
    model, fit = init._looked_at(None)
    assert (model, fit.trains) == ("a/tiny", True)
    assert list(answered[0]) == ["a/tiny", "smollm2-135m", Config().model, "a/bert"]
    assert answered[0]["a/tiny"] == "on this machine, trains here"
    assert answered[0]["a/bert"] == "on this machine, doesn't train here"
