"""SIGTERM, SIGINT and SIGUSR1 in any phase: saved at the step's end, exit 75, and the resumed run is the whole one."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.campaigns import campaign
from tests.campaigns.campaign import Process

PHASES = ("setup", "step", "save", "evaluation", "results")


def into(phase: str, process: Process, run: Path, chance: random.Random) -> bool:
    """Wait for a moment of a phase; False if the process ended before."""
    checkpoints, metrics, adapter = run / "checkpoints", run / "metrics.jsonl", run / "adapter"
    wait = {
        "setup": (lambda: (run / ".lock").exists(), 2.0),
        "step": (lambda: metrics.exists() and metrics.stat().st_size > 0, 1.0),
        "save": (lambda: any(checkpoints.glob(".*.partial")), 0.01),
        "evaluation": (lambda: metrics.exists() and '"step": 4,' in metrics.read_text("utf-8"), 0.05),
        "results": (adapter.exists, 0.5),
    }
    condition, longest = wait[phase]
    if not campaign.wait_until(condition, process, pause=0.0002 if phase == "save" else 0.02):
        return False
    time.sleep(chance.uniform(0.0, longest))
    return process.running


def last_step(run: Path) -> int:
    return max(campaign.trajectory(run), default=0) if (run / "metrics.jsonl").exists() else 0


def test_signals_in_every_phase(train: Callable[..., list[str]], tmp_path: Path) -> None:
    chance = random.Random(20261124)
    more = ("--eval-share", "0.2", "--eval-steps", "4")
    whole = tmp_path / "whole"
    assert Process(train(whole, *more), tmp_path / "whole.log").wait() == 0
    wanted = campaign.count(100, 5)
    done: Counter[str] = Counter()
    seconds: list[float] = []
    steps_after: list[int] = []
    trial = 0
    while sum(done.values()) < wanted:
        phase = PHASES[trial % len(PHASES)]
        trial += 1
        number = chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        twice = chance.random() < (0.5 if phase == "save" else 0.2)
        run, log, over = (tmp_path / f"run{trial}{suffix}" for suffix in ("", ".log", ".steps"))
        process = Process(train(run, *more), log, "tests.campaigns.faults:count_steps", file=str(over))
        if not into(phase, process, run, chance):
            assert process.wait() == 0, process.output()
            continue
        process.send(signal.SIGSTOP)  # so that no step ends between the look at the file and the signal
        before, began = int(over.read_text() or 0) if over.exists() else 0, time.monotonic()
        process.send(number)
        process.send(signal.SIGCONT)
        if twice:
            time.sleep(0.005)
            process.send(number)
        code = process.wait()
        if code == 0:  # it came after the last moment
            continue
        assert code == 75, f"{phase}, {number.name}: exit {code}\n{process.output()}"
        seconds.append(time.monotonic() - began)
        if not twice:
            assert "stopped by" in process.output()
            ways_on = (f"slimtune resume {run}", "same command again", f"The run is whole: {run}")
            assert any(way in process.output() for way in ways_on)
            steps_after.append(last_step(run) - before)
        begun = (run / "config.yaml").exists()
        again = Process(["resume", str(run)] if begun else train(run, *more), log)
        assert again.wait() == 0, again.output()
        assert campaign.trajectory(run) == campaign.trajectory(whole)
        assert campaign.adapter_sha256(run) == campaign.adapter_sha256(whole)
        assert evaluations(run) == evaluations(whole)
        done[f"{phase}{', twice' if twice else ''}"] += 1
    assert max(steps_after, default=0) <= 1  # the one under way is finished
    campaign.record(
        "signals",
        {
            "signals": sum(done.values()),
            "exit_75_and_resumed_equal": sum(done.values()),
            "by_phase": dict(sorted(done.items())),
            "most_steps_after_a_signal": max(steps_after, default=0),
            "seconds_to_exit": {"median": round(sorted(seconds)[len(seconds) // 2], 2), "most": round(max(seconds), 2)},
        },
    )


def evaluations(run: Path) -> dict[int, float]:
    """The evaluation loss by step; of a step that was evaluated twice, the last."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
