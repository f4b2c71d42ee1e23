"""Several ranks train one run: to the bit as one process where sums allow it, and no end of a rank keeps the others."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slimtune.run.folder import RunFolder
from slimtune.run.history import read_history
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


def test_no_rank_waits_for_anothers_disk(train: Command, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """Ten steps are made while a save is under way, in which four more are due; and the other rank is gone before the
    last one is on the disk."""
    run, over = tmp_path / "run", tmp_path / "over"
    ranks = Ranks(
        2, train(run, *TWO, "--engine", "fused"), tmp_path / "log", "blocked_disk",
        metrics=str(run / "metrics.jsonl"), over=str(over),
    )  # fmt: skip
    assert ranks.processes[1].wait(90) == 0, ranks.output()
    assert ranks.processes[0].running
    over.touch()
    assert ranks.wait(60) == [0, 0], ranks.output()
    assert campaign.adapter_sha256(run) == campaign.adapter_sha256(alone("fused"))


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
    goes_on = Process(["resume", str(run), "--lang", "zh"], tmp_path / "log2")
    assert goes_on.wait() == 0
    assert campaign.adapter_sha256(run) == campaign.adapter_sha256(alone("fused"))
    (change,) = read_history(RunFolder.open(run).metrics()).ranks
    assert (change["before"], change["after"]) == (2, 1)
    assert "进程数：此前 2，此后 1" in goes_on.output()
    assert f"从第 {change['step'] + 1} 步起由 1 个进程" in (run / "report.md").read_text("utf-8")


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_what_happens_to_one_rank_is_everyones(engine: str, train: Command, tmp_path: Path) -> None:
    """A NaN, a bit that turned, memory that ran out: all ranks end with one code and one message, or all go on."""
    nan, turned, little = ({"where": "gradient", "step": 3}, {"where": "parameter", "step": 3}, {"step": 3})
    stops = {
        "gradient": ("spoil", nan, [], "is nan in step 3 on rank 1", 2),
        "loss": ("spoil", nan | {"where": "loss"}, [], "loss is nan in step 3 on rank 1", 2),
        "parameter": ("spoil", turned, [], "the adapter of rank 1 isn't rank 0's before step 3", 2),
        "memory": ("refuse_large", little | {"tokens": 0}, [], "rank 1: out of memory in step 3 even with one", 2),
        "skipped": ("spoil", nan, ["--on-nonfinite", "skip"], "is nan in step 3 on rank 1: batch skipped", None),
        "pieces": ("refuse_large", little | {"tokens": 100}, [], "rank 1 ran out of memory: micro-batches now", None),
    }
    for name in stops if campaign.FULL else ("gradient", "memory", "pieces"):
        fault, values, more, what, last = stops[name]
        run = tmp_path / name
        ranks = Ranks(
            2, train(run, *TWO, *more, "--save-steps", "100", "--engine", engine), run.with_suffix(".log"), "at_last",
            fault=fault, values=values,
        )  # fmt: skip
        code = 0 if last is None else 3
        assert ranks.wait(60) == [code, code], f"{name}:\n{ranks.output()}"
        first, other = (process.output() for process in ranks.processes)
        assert what in first, f"{name}:\n{first}"
        assert first.count(what) == 1, first
        assert "step 3" not in other, f"{name}: the other rank has nothing to say\n{other}"
        steps = campaign.trajectory(run)
        assert max(steps) == (last or max(steps)), f"{name}: a step of it was applied"


def test_ranks_that_arent_alike_are_refused_by_name(train: Command, parts: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = train(run, *TWO)
    ranks = Ranks(2, arguments, tmp_path / "log", "as_rank_with", odd=["--lora-r", "4"])
    assert ranks.wait(60) == [2, 2], ranks.output()
    assert "rank 1 isn't like rank 0 rank 0 rank 1 lora_r 8 4 " in " ".join(ranks.processes[0].output().split())
    assert not run.exists()


def test_a_rank_that_never_gets_there_keeps_nobody_waiting(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Three ranks on a host of two GPUs, and no launcher that would end the others."""
    run = tmp_path / "run"
    arguments = ["train", *map(str, parts), "-o", str(run), "--gradient-accumulation", "3"]
    ranks = Ranks(3, arguments, tmp_path / "log", "as_rank_of", cards="0,1")
    assert ranks.wait(60) == [2, 2, 2], ranks.output()
    first, second, third = (process.output() for process in ranks.processes)
    assert first.count("error: rank 2 has no GPU: 3 processes were started on a host with 2") == 1, first
    assert "rank 2 has no GPU" in third
    assert not second
    assert not run.exists()


def test_hosts_that_arent_alike_are_refused_by_rank(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Each is said once, by rank 0, and nothing at the other; each rank has its own files under the same names."""
    here, odd_base, odd_data = (tmp_path / name for name in ("here", "odd-base", "odd-data"))
    for folder in (here, odd_base, odd_data):
        shutil.copytree(parts[0], folder / "model")
        shutil.copy(parts[1], folder / "rows.jsonl")
    campaign.make_model(odd_base / "model", seed=1)
    campaign.make_rows(odd_data / "rows.jsonl", 35)
    odd = {
        r"rank 1 isn't like rank 0\n .* rank 1\n +device .* another card \(24 GiB\)\n": {"what": "card"},
        r"rank 1 isn't like rank 0\n .* rank 1\n +peft .* 0\.21\.1\n": {"what": "versions"},
        r"rank 1 isn't like rank 0\n .* rank 1\n +base weights ": {"what": "files", "folder": str(odd_base)},
        r"rank 1 isn't like rank 0\n .* rank 1\n +data rows.jsonl ": {"what": "files", "folder": str(odd_data)},
        "rank 1: model does not fit this GPU's memory": {"what": "room"},
    }
    for number, (line, values) in enumerate(odd.items()):
        if not campaign.FULL and number in (0, 2):
            continue
        run = tmp_path / f"run{number}"
        arguments = ["train", "model", "rows.jsonl", "-o", str(run), *campaign.OPTIONS, *TWO]
        ranks = Ranks(
            2, arguments, run.with_suffix(".log"), "at_last", folder=str(here), fault="unlike", values=values
        )  # fmt: skip
        assert ranks.wait(60) == [2, 2], ranks.output()
        first, other = (process.output() for process in ranks.processes)
        assert re.search(f"error: {line}", first), first
        assert "error" not in other, other
        assert not run.exists()
