"""How a run ends: what it says of the model that it made, and the exit code."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slimtune import cli
from slimtune.base.tokenizer import load_tokenizer
from slimtune.cli import watch
from slimtune.config import Config
from slimtune.data.packing import micro_batches
from slimtune.data.preflight import prove
from slimtune.plan import steps_of_run
from slimtune.serve.address import listen
from slimtune.use.rehearse import ANSWER_TOKENS
from tests.cli.conftest import Done
from tests.serve.chromium import Browser, browser


def test_a_run_says_whether_the_model_is_better(
    run_here: Callable[..., Done], tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    words = (
        "train", str(tiny_model), str(requests_file), "--gradient-accumulation", "1",
        "--max-length", "128", "--lr-scheduler", "constant",
    )  # fmt: skip
    done = run_here(*words, "-o", str(good), "--learning-rate", "3e-2", "--max-steps", "8", "--watch")
    assert done.returncode == 0, done.stderr
    assert "  watch    http://127.0.0.1:" in done.stderr
    assert "better than before the training on 10 held-out documents" in done.stderr
    for said in (f"slimtune chat {good}", f"slimtune compare {good}", str(good / "report.html")):
        assert said in done.stderr

    # From what the first one has learned there is something to lose.
    told = f"cat > {tmp_path / 'told.json'}"
    more = ("--from", str(good), "--learning-rate", "500", "--max-steps", "4", "--notify", told)
    done = run_here(*words, "-o", str(bad), *more)
    assert done.returncode == 4, done.stderr
    assert json.loads((tmp_path / "told.json").read_text())["outcome"] == "worse"
    assert "WORSE than before the training on 10 held-out documents" in done.stderr
    assert "Take a lower learning rate: --learning-rate 0.001" in done.stderr
    assert "WORSE" in (bad / "report.md").read_text()
    first, second = (json.loads((run / "facts.json").read_text())["verdict"] for run in (good, bad))
    assert second["start"]["value"] == first["end"]["value"]
    assert second["change"]["low"] > 0.1
    assert run_here("explain", str(bad)).returncode == 1


def test_a_dry_run_says_what_would_be_done_and_needs_no_weights(
    run_here: Callable[..., Done], tiny_model: Path, requests_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    words = ("train", str(model), str(requests_file), "-o", str(tmp_path / "run"), "--max-length", "128", "--dry-run")
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    assert "200 rows" in done.stderr
    assert "10 documents held out" in done.stderr
    assert "With documents of 128 tokens it takes" in done.stderr
    planned = json.loads(run_here(*words, "--json").stdout)
    config = Config.make(model=str(model), data=str(requests_file), max_length=128, eval_share=0.05)
    packs = micro_batches(prove(config, load_tokenizer(str(model))).train, config).per_epoch
    assert planned["steps"] == steps_of_run(config, packs) == -(-3 * packs // 2)
    assert f"{planned['steps']} optimizer steps of 2 micro-batches, 3 epochs" in done.stderr
    assert {choice["key"]: choice["value"] for choice in planned["choices"]}["eval_share"] == 0.05
    # Eight epochs, in each of which half of the answers come.
    done = run_here(*words, "--rehearse", "10%", "--epochs", "8", "--json")
    longer, config = json.loads(done.stdout), config.model_copy(update={"epochs": 8.0})
    assert "96 general prompts at most" in run_here(*words, "--rehearse", "10%").stderr
    assert longer["steps"] == steps_of_run(config, packs + math.ceil(96 * ANSWER_TOKENS / 128) / 2)
    assert longer["tokens"] / planned["tokens"] == pytest.approx(longer["steps"] / planned["steps"], rel=0.1)
    assert not (tmp_path / "run").exists()


def test_a_probe_measures_steps_and_leaves_nothing(
    run_here: Callable[..., Done],
    tiny_model: Path,
    requests_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ("train", str(tiny_model), str(requests_file), "--max-length", "128", "--max-steps", "40", "--probe")
    assert "--probe goes with --dry-run" in run_here(*words).stderr
    done = run_here(*words, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    often = {choice["key"]: choice["value"] for choice in planned["choices"]}["eval_steps"]
    took = planned["seconds"]
    assert took["step"] > 0 < took["evaluation"]
    assert took["run"] == pytest.approx(40 * took["step"] + (1 + 40 // often) * took["evaluation"])
    assert list(tmp_path.iterdir()) == []


def test_the_pages_button_stops_a_run_with_a_checkpoint(
    run_here: Callable[..., Done],
    tiny_model: Path,
    requests_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a browser, on a run that goes: two presses, exit code 75, and the page tells how to go on."""
    run, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(watch, "_PORT", port)
    monkeypatch.setattr(watch.secrets, "token_urlsafe", lambda size: "a-token")
    # This process goes on, and hears signals.
    monkeypatch.setattr(cli, "end_anyway", lambda: None)
    monkeypatch.setattr(cli, "STOP_SIGNALS", ())
    with browser(tmp_path / "profile") as tab, ThreadPoolExecutor(1) as beside:
        pressed = beside.submit(_press, tab, port)
        done = run_here("train", str(tiny_model), str(requests_file), "-o", str(run), "--max-length", "128",
                        "--max-steps", "100000", "--save-steps", "100000", "--watch")  # fmt: skip
        assert done.returncode == 75, done.stderr
        assert f"slimtune resume {run}" in pressed.result()
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def _press(tab: Browser, port: int) -> str:
    """Press the button of the page that will be on ``port``; what the page says in the end."""
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    tab.show(f"http://127.0.0.1:{port}/a-token/?lang=en")
    for _ in range(2):  # the first one asks whether it is meant
        tab.until("document.querySelector('button[data-run]') && /step|loss/i.test(document.body.innerText)")
        tab.run("document.querySelector('button[data-run]').click()")
    tab.until("document.body.innerText.includes('slimtune resume')")
    return str(tab.run("document.body.innerText"))
