"""A hang in preparation, data, step or save: all stacks are written, exit 75, and the run can be gone on with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from tests.campaigns import campaign
from tests.campaigns.campaign import Process


def test_hangs(train: Callable[..., list[str]], reference: Callable[[str], Path], tmp_path: Path) -> None:
    kinds = list(itertools.product(("preparation", "data", "step", "save"), ("sleep", "lock", "pipe", "child")))
    wanted = campaign.count(20, 2)
    for trial in range(wanted):
        where, how = kinds[(trial * 5) % len(kinds)]
        at = {"preparation": 1, "data": 9, "step": 14, "save": 3}[where] + trial // len(kinds) * (
            where != "preparation"
        )
        run, log = tmp_path / f"run{trial}", tmp_path / f"run{trial}.log"
        arguments = train(run, "--watchdog", "6", "--engine", "fused")
        process = Process(arguments, log, "tests.campaigns.faults:hang", where=where, how=how, at=at)
        assert process.wait() == 75, process.output()
        assert "no progress in" in process.output()
        stacks = (run / "stacks.txt").read_text("utf-8")
        assert "stuck_here" in stacks, stacks
        assert stacks.count("Thread 0x") >= 2, stacks  # all threads, not only the one that hangs
        began = (run / "config.yaml").exists()
        assert began == (where != "preparation")
        again = Process(["resume", str(run), "--watchdog", "0"] if began else arguments, log)
        assert again.wait() == 0, again.output()
        assert campaign.trajectory(run) == campaign.trajectory(reference("fused"))
        assert campaign.adapter_sha256(run) == campaign.adapter_sha256(reference("fused"))
    campaign.record("watchdog", {"hangs": wanted, "exit_75_stacks_and_resumed_equal": wanted})
