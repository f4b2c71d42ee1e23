"""A file of the newest checkpoint truncated, flipped by one bit, or gone: found, named, the one before it taken."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from slimtune.training.checkpoint import Checkpoints
from tests.campaigns import campaign
from tests.campaigns.campaign import Process

KINDS = ("truncated", "flipped", "gone")


def damage(file: Path, kind: str, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "flipped":
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    else:
        file.unlink()


def test_damage_is_found(reference: Callable[[str], Path], tmp_path: Path) -> None:
    chance = random.Random(20261124)
    whole = reference("fused")
    wanted, resumed = campaign.count(300, 60), campaign.count(12, 1)
    found: Counter[str] = Counter()
    for trial in range(wanted):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        newest, before = Checkpoints(run / "checkpoints").steps()[:2]
        folder = run / "checkpoints" / f"checkpoint-{newest}"
        victim, kind = chance.choice(sorted(folder.iterdir())), KINDS[trial % 3]
        damage(victim, kind, chance)
        told: list[str] = []
        if trial < resumed:
            shutil.rmtree(run / "adapter")  # a finished run stays as it is
            log = tmp_path / f"resume{trial}.log"
            process = Process(["resume", str(run)], log)
            assert process.wait() == 0, process.output()
            told = [" ".join(process.output().split())]
            assert f"from step {before}" in told[0]
            assert campaign.trajectory(run) == campaign.trajectory(whole)
            assert campaign.adapter_sha256(run) == campaign.adapter_sha256(whole)
        else:
            taken = Checkpoints(run / "checkpoints", tell=told.append).newest_valid()
            assert taken == run / "checkpoints" / f"checkpoint-{before}"
        assert len(told) == 1
        assert victim.name in told[0] or "SHA256SUMS" in victim.name
        found[f"{kind} {victim.name}"] += 1
    campaign.record(
        "corruption",
        {
            "damaged": wanted,
            "found_named_and_fell_back": wanted,
            "of_these_resumed_equal": resumed,
            "kinds": dict(found),
        },
    )
