"""Several ranks train one run: to the bit as one process where sums allow it, and no end of a rank keeps the others."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.campaigns import campaign
from tests.campaigns.campaign import Process
from tests.campaigns.ranks import Ranks
from tests.tolerances import SUM_OF_RANKS

Command = Callable[..., list[str]]
TWO = ["--gradient-accumulation", "2", "--eval-share", "0.2", "--samples", "0"]


@pytest.fixture(scope="module")
def alone(train: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One process's run with steps of two micro-batches, by engine."""
    made: dict[str, Path] = {}

    def of(engine: str) -> Path:
        if engine not in made:
            run = tmp_path_factory.mktemp("alone") / engine
            process = Process(train(run, *TWO, "--engine", engine), run.with_suffix(".log"))
            assert process.wait() == 0, process.output()
            made[engine] = run
        return made[engine]

    return of


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_two_ranks_train_one_processs_adapter_to_the_bit(
    engine: str, train: Command, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = Ranks(2, train(run, *TWO, "--engine", engine), tmp_path / "log")
    assert ranks.wait() == [0, 0], ranks.output()
    assert campaign.trajectory(run) == campaign.trajectory(alone(engine))
    assert campaign.adapter_sha256(run) == campaign.adapter_sha256(alone(engine))
    assert "rank" not in ranks.processes[1].output(), "the other ranks are silent"


def test_three_ranks_sum_one_processs_gradient_and_repeat(train: Command, tmp_path: Path) -> None:
    options = ["--gradient-accumulation", "6", "--max-steps", "3", "--eval-share", "0", "--engine", "fused"]
    gradients = []
    for number, count in enumerate((1, 3, 3)):
        run, file = tmp_path / f"run{number}", tmp_path / f"gradients{number}"
        ranks = Ranks(count, train(run, *options), tmp_path / f"log{number}", "noting", file=str(file))
        assert ranks.wait() == [0] * count, ranks.output()
        gradients.append(torch.load(file))
    one, three, again = gradients
    assert (one[0] - three[0]).abs().max() <= SUM_OF_RANKS * one[0].abs().max()
    assert torch.equal(three, again)
    assert campaign.adapter_sha256(tmp_path / "run1") == campaign.adapter_sha256(tmp_path / "run2")


def test_killed_ranks_keep_nobody_and_the_run_goes_on_to_the_bit(
    train: Command, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    chance = random.Random(20261129)
    kills, slowest, began = 0, 0.0, time.monotonic()
    wanted = campaign.count(50, 1)
    for number in range(wanted):
        run, engine = tmp_path / f"run{number}", ("fused", "plain")[number % 2]
        ranks = Ranks(2, train(run, *TWO, "--engine", engine), tmp_path / f"log{number}")
        victim, metrics = chance.randrange(2), run / "metrics.jsonl"
        steps = chance.randrange(0, 12)

        def so_far(metrics: Path = metrics, steps: int = steps) -> bool:
            return metrics.exists() and metrics.read_text().count('"step_seconds"') >= steps

        if campaign.wait_until(so_far, ranks.processes[victim], pause=0.005):
            time.sleep(chance.uniform(0.0, 0.1))
            ranks.processes[victim].kill()
            kills += 1
            killed = time.monotonic()
            codes = ranks.wait(60)
            slowest = max(slowest, time.monotonic() - killed)
            assert codes[victim] in (-signal.SIGKILL, 0)
            assert codes[1 - victim] in (75, 0), ranks.output()
        if not (run / "config.yaml").exists():
            continue  # before there was anything to go on from
        # Every other time on one rank, which sums two micro-batches as two ranks do.
        goes_on = Ranks(2 - number // 2 % 2, ["resume", str(run)], tmp_path / f"log{number}b")
        assert not any(goes_on.wait()), goes_on.output()
        assert campaign.trajectory(run) == campaign.trajectory(alone(engine)), f"{run}: another trajectory"
        assert campaign.adapter_sha256(run) == campaign.adapter_sha256(alone(engine)), f"{run}: another adapter"
    assert kills > wanted // 2
    seconds = round(time.monotonic() - began)
    campaign.record("ranks", {"kills": kills, "slowest_end_s": round(slowest, 1), "seconds": seconds})


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    train: Command, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = Ranks(2, train(run, *TWO, "--engine", "fused"), tmp_path / "log")
    metrics = run / "metrics.jsonl"
    assert campaign.wait_until(lambda: metrics.exists() and '"step_seconds"' in metrics.read_text(), ranks.processes[1])
    ranks.processes[1].send(signal.SIGTERM)
    assert ranks.wait(60) == [75, 75], ranks.output()
    assert any((run / "checkpoints").glob("checkpoint-*"))
    assert Process(["resume", str(run)], tmp_path / "log2").wait() == 0
    assert campaign.adapter_sha256(run) == campaign.adapter_sha256(alone("fused"))


def test_ranks_that_arent_alike_are_refused_by_name(train: Command, parts: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = train(run, *TWO)
    ranks = Ranks(2, arguments, tmp_path / "log", "as_rank_with", odd=["--lora-r", "4"])
    assert ranks.wait(60) == [2, 2], ranks.output()
    assert "rank 1 has another lora_r: 4; rank 0 has 8" in ranks.processes[0].output()
    assert not run.exists()
