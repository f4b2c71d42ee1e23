"""A disk that really is full, for a while and for good: a small tmpfs. Skipped where none can be mounted."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slimtune.training.checkpoint import Checkpoints
from tests.campaigns import campaign
from tests.campaigns.campaign import Process

SLOW = "tests.campaigns.faults:slow"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def step_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text("utf-8").count('"grad_norm"') if file.exists() else 0


def events(run: Path) -> list[str]:
    records = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [record["event"] for record in records if "event" in record]


def test_a_full_disk_costs_no_step(
    train: Callable[..., list[str]], reference: Callable[[str], Path], small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    process = Process(train(run, "--engine", "fused"), tmp_path / "log", SLOW, seconds=0.4)
    assert campaign.wait_until(lambda: step_of(run) >= 5, process, pause=0.02)
    filler = fill(small_disk)
    assert campaign.wait_until(lambda: "could not be saved" in process.output(), process, pause=0.05)
    filler.unlink()
    assert process.wait() == 0, process.output()
    assert "save_failed" in events(run)
    assert events(run)[-1] == "save_recovered"
    assert campaign.trajectory(run) == campaign.trajectory(reference("fused"))
    assert campaign.adapter_sha256(run) == campaign.adapter_sha256(reference("fused"))


@pytest.mark.skipif(not campaign.FULL, reason="it waits a minute for room")
def test_a_disk_that_stays_full_ends_in_exit_3_and_goes_on_later(
    train: Callable[..., list[str]], reference: Callable[[str], Path], small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    process = Process(train(run, "--engine", "fused"), tmp_path / "log", SLOW, seconds=0.2)
    assert campaign.wait_until(lambda: step_of(run) >= 7, process, pause=0.02)
    filler = fill(small_disk)
    assert process.wait() == 3, process.output()
    newest = Checkpoints(run / "checkpoints").newest_valid()
    assert newest is not None
    assert str(newest) in "".join(process.output().split())
    filler.unlink()
    again = Process(["resume", str(run)], tmp_path / "log")
    assert again.wait() == 0, again.output()
    assert campaign.adapter_sha256(run) == campaign.adapter_sha256(reference("fused"))
