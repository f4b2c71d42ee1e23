"""SIGKILL at random moments, at least 40 % of them during a save: the resumed run is the uninterrupted one."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.campaigns import campaign
from tests.campaigns.campaign import Process


def kill_at_random(process: Process, run: Path, chance: random.Random) -> bool:
    """Kill a run at a random moment of its training, mostly in a save. False if it ended before."""
    started = run / "metrics.jsonl"
    before = started.stat().st_size if started.exists() else 0
    if not campaign.wait_until(lambda: started.exists() and started.stat().st_size > before, process, pause=0.01):
        return False
    if chance.random() < 0.8:
        # When a save has come so far, by its files: a machine's disk may be slow or fast.
        earlier, files = chance.randrange(0, 3), chance.randrange(0, 9)
        moments = [lambda: files_of_a_save(run) >= 0, lambda: files_of_a_save(run) < 0] * earlier
        for moment in (*moments, lambda: files_of_a_save(run) >= files):
            if not campaign.wait_until(moment, process, pause=0.0001):
                return False
    else:
        time.sleep(chance.uniform(0.0, 0.8))
    if not process.running:
        return False
    process.kill()
    return True


def files_of_a_save(run: Path) -> int:
    """Files that the save under way has written; -1 if none is."""
    for partial in (run / "checkpoints").glob(".*.partial"):
        with suppress(FileNotFoundError):  # whole in this moment
            return sum(1 for _ in partial.iterdir())
    return -1


def test_kills_at_random_moments(
    train: Callable[..., list[str]], reference: Callable[[str], Path], tmp_path: Path
) -> None:
    chance = random.Random(20261124)
    wanted = campaign.count(200, 6)
    kills: Counter[str] = Counter()
    compared = 0
    started = time.monotonic()
    while sum(kills.values()) < wanted:
        engine = ("fused", "plain")[compared % 2]
        run, log = tmp_path / f"run{compared}", tmp_path / f"run{compared}.log"
        arguments = train(run, "--engine", engine)
        for _ in range(chance.randrange(2, 6)):
            process = Process(arguments, log)
            if not kill_at_random(process, run, chance):
                assert process.wait() == 0, process.output()
                break
            kills["in a save" if campaign.in_a_save(run) else "elsewhere"] += 1
            arguments = ["resume", str(run)]
        assert Process(["resume", str(run)], log).wait() == 0, log.read_text("utf-8")
        whole = reference(engine)
        assert campaign.trajectory(run) == campaign.trajectory(whole), f"{run}: another trajectory"
        assert campaign.adapter_sha256(run) == campaign.adapter_sha256(whole), f"{run}: another adapter"
        compared += 1
    total = sum(kills.values())
    assert kills["in a save"] >= 0.4 * total, kills
    campaign.record(
        "kills",
        {
            "kills": total,
            "in_a_save": kills["in a save"],
            "runs_compared": compared,
            "runs_equal": compared,
            "steps_each": len(campaign.trajectory(reference("fused"))),
            "seconds": round(time.monotonic() - started),
        },
    )
