"""`slimtune explain` as people and programs call it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slimtune.config import Config
from slimtune.recipes import finetune

SLIMTUNE = [sys.executable, "-c", "from slimtune.cli import main; main()"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, requests_file: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "trained"
    config = Config.make(
        model=str(tiny_model), data=str(requests_file), output=output, max_steps=4, max_length=128, learning_rate=1e-2
    )
    return finetune(config).path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def explain(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    return subprocess.run(
        [*SLIMTUNE, "explain", *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )


def test_the_four_parts_in_both_languages(run: Path) -> None:
    english, chinese = explain(run), explain(run, "--lang", "zh")
    assert (english.returncode, english.stderr, chinese.returncode, chinese.stderr) == (0, "", 0, "")
    for number, title in enumerate(("preparation", "LoRA", "wrapping", "train and save"), 1):
        assert f"Part {number} · {title}" in english.stdout
    for title in ("一、准备阶段", "二、LoRA 配置", "三、模型封装", "四、训练与保存"):
        assert title in chinese.stdout
    assert "✓ trl.SFTTrainer was given a plain LlamaForCausalLM" in english.stdout
    assert "✓ 交给 trl.SFTTrainer 的是普通的 LlamaForCausalLM" in chinese.stdout


def test_json_for_programs(run: Path) -> None:
    done = explain(run, "--json")
    value = json.loads(done.stdout)
    assert value["facts"] == json.loads((run / "facts.json").read_text("utf-8"))
    assert value["counts"]["broken"] == 0
    statuses = [statement["status"] for section in value["sections"] for statement in section["statements"]]
    assert value["counts"] == {status: statuses.count(status) for status in ("proved", "broken", "unmeasured")}


def test_a_base_that_changed_is_shouted_and_fails(run: Path) -> None:
    facts = json.loads((run / "facts.json").read_text("utf-8"))
    facts["base"]["fingerprint_after"] = "0" * 64
    (run / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    done = explain(run)
    assert done.returncode == 1
    assert "BROKEN: THE FROZEN BASE CHANGED" in done.stdout


def test_mistakes_exit_2_with_a_message(run: Path, tmp_path: Path) -> None:
    nothing = explain(tmp_path / "nothing")
    assert (nothing.returncode, "is no run of slimtune" in nothing.stderr) == (2, True)
    (run / "facts.json").write_text("{", encoding="utf-8")
    damaged = explain(run)
    assert (damaged.returncode, "can't be read" in damaged.stderr) == (2, True)
    (run / "facts.json").unlink()
    unmeasured = explain(run)
    assert (unmeasured.returncode, "has no facts.json" in unmeasured.stderr) == (2, True)
    assert "Traceback" not in nothing.stderr + damaged.stderr + unmeasured.stderr
