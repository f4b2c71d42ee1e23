"""``slimtune plan``: a table for people, JSON for scripts, and mistakes in one line with the way out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from slimtune.hardware import Hardware
from tests.cli.conftest import Done


def test_the_table_says_what_a_card_takes(run_here: Callable[..., Done], tiny_model: Path) -> None:
    done = run_here("plan", str(tiny_model), "--gpu", "nvidia rtx-4090", "--max-length", "4096")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "x 4,096 tokens" in lines[2]
    assert [line.split()[0] for line in lines[5:12]] == ["RTX", "8GiB", "12GiB", "16GiB", "24GiB", "48GiB", "80GiB"]
    assert all(" yes " in line for line in lines[5:12])
    assert lines[4].endswith("a step")
    assert all(line.endswith(" s") for line in lines[5:12])


@pytest.mark.parametrize("lang", ["en_GB", "zh_CN"])
def test_a_narrow_terminal_gets_fewer_columns(
    lang: str, run_here: Callable[..., Done], tiny_model: Path, requests_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LC_ALL", lang)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    done = run_here("plan", str(tiny_model), str(requests_file), "--max-length", "512")
    table = [line for line in done.stdout.splitlines() if "GiB (" in line or "RTX" in line]
    assert len(table) == 6
    assert max(map(cell_len, done.stdout.splitlines())) <= 80
    for english, chinese in (("this data", "这些数据"), ("longest", "最长"), ("A wider terminal", "终端更宽时")):
        assert (english if lang == "en_GB" else chinese) in done.stdout


def test_json_adds_up_and_holds_what_the_data_would_do(
    run_here: Callable[..., Done], tiny_model: Path, requests_file: Path
) -> None:
    words = ("plan", str(tiny_model), str(requests_file), "--memory", "1GiB", "--max-length", "128", "--json")
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    asked = told["cards"][0]
    assert asked["card"] == "1GiB"
    assert asked["budget"] == 2**30
    assert asked["bytes"] == sum(asked["parts"].values()) <= 2**30
    assert told["steps"] > 0
    assert asked["run_seconds"] == 0.0  # nobody knows the speed of "1GiB"
    per_token = [card["run_seconds"] / told["tokens"] for card in told["cards"][1:]]
    assert per_token[-1] < per_token[0]
    assert told["trainable_parameters"] > 0
    assert told["download_bytes"] < sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))


def test_data_for_a_card_that_multiplies_in_what_this_machine_doesnt(
    run_here: Callable[..., Done], tiny_model: Path, requests_file: Path
) -> None:
    words = ("plan", str(tiny_model), str(requests_file), "--gpu", "H100", "--precision", "fp8", "--json")
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cards"][0]["run_seconds"] > 0


def test_how_much_is_large_enough_for_fp8_is_said_by_a_dry_run_too(
    run_here: Callable[..., Done], tiny_model: Path, requests_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardware, "without_fp8", None)
    asked = "--precision", "fp8"
    done = run_here("plan", str(tiny_model), "--gpu", "H100", *asked)
    assert "no product of this run is large enough for FP8" in done.stdout
    monkeypatch.setattr("slimtune.training.forecast.pays", lambda *shape: True)
    run = "train", str(tiny_model), str(requests_file), "--dry-run", "--memory", "1GiB", "--compute-dtype", "bf16"
    said = " ".join(run_here(*run, *asked).stderr.split())
    assert "engine fused, 100% of the layers' products in FP8" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "H1000"), "unknown GPU 'H1000'"),
        (("--memory", "lots"), "memory"),
        (("--gpu", "A100", "--precision", "fp8"), "A100 (compute capability 8.0) multiplies no FP8"),
        (("--gpu", "V100", "--precision", "bf16"), "V100 has no native bf16"),
    ],
)
def test_mistakes_are_said_with_the_way_out(
    words: tuple[str, ...], said: str, run_here: Callable[..., Done], tiny_model: Path
) -> None:
    done = run_here("plan", str(tiny_model), *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_engine_doesnt_take_has_no_table(run_here: Callable[..., Done], tiny_model: Path) -> None:
    done = run_here("plan", str(tiny_model), "--dora")
    assert done.returncode == 0
    assert "engine    plain: the engine has nothing for DoRA" in done.stdout
    assert json.loads(run_here("plan", str(tiny_model), "--dora", "--json").stdout)["cards"] == []


def test_a_dry_run_within_a_memory_says_its_plan(
    run_here: Callable[..., Done], tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    words = ("train", str(tiny_model), str(requests_file), "-o", str(tmp_path / "run"), "--dry-run", "--memory")
    assert "GiB of 1GiB planned: weights" in " ".join(run_here(*words, "1GiB").stderr.split())
    assert "memory: 1MiB is too little" in " ".join(run_here(*words, "1MiB").stderr.split())
