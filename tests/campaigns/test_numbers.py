"""NaN in each place and memory that runs out, through the command line: exit codes, words, and what is on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slimtune.training.checkpoint import Checkpoints, nonfinite
from tests.campaigns import campaign
from tests.campaigns.campaign import Process

ENGINES = ("fused", "plain") if campaign.FULL else ("fused",)
PLACES = ("loss", "gradient", "parameter", "optimizer state") if campaign.FULL else ("gradient", "parameter")
POISON, REFUSE = "tests.campaigns.faults:poison", "tests.campaigns.faults:refuse_large"


def no_bad_file(run: Path) -> bool:
    return not any(nonfinite(load_file(file)) for file in run.rglob("*.safetensors"))


def events(run: Path, kind: str) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [record for record in records if record.get("event") == kind]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", PLACES)
def test_a_nan_stops_in_its_step(train: Callable[..., list[str]], tmp_path: Path, where: str, engine: str) -> None:
    run = tmp_path / "run"
    process = Process(train(run, "--engine", engine), tmp_path / "log", POISON, where=where, step=5)
    assert process.wait() == 3, process.output()
    assert "in step 5" in process.output()
    assert max(campaign.trajectory(run)) == 4
    assert no_bad_file(run)
    assert not (run / "adapter").exists()
    (event,) = events(run, "guard")
    assert bool(event["rows"]) == (where in ("loss", "gradient"))
    if event["rows"]:
        assert "rows.jsonl:" in process.output()
    assert Checkpoints(run / "checkpoints").newest_valid() is not None


def test_a_stopped_run_goes_on_without_the_poison(
    train: Callable[..., list[str]], reference: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = train(run, "--engine", "fused")
    assert Process(arguments, tmp_path / "log", POISON, where="gradient", step=5).wait() == 3
    assert Process(["resume", str(run)], tmp_path / "log").wait() == 0
    assert campaign.trajectory(run) == campaign.trajectory(reference("fused"))
    assert campaign.adapter_sha256(run) == campaign.adapter_sha256(reference("fused"))


@pytest.mark.parametrize("engine", ENGINES)
def test_skip_goes_on_to_a_good_adapter(train: Callable[..., list[str]], tmp_path: Path, engine: str) -> None:
    run = tmp_path / "run"
    arguments = train(run, "--engine", engine, "--on-nonfinite", "skip")
    process = Process(arguments, tmp_path / "log", POISON, where="gradient", step=5)
    assert process.wait() == 0, process.output()
    assert len(events(run, "skipped")) == 1
    assert no_bad_file(run)


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_that_runs_out_halves_the_micro_batch(
    train: Callable[..., list[str]], reference: Callable[[str], Path], tmp_path: Path, engine: str
) -> None:
    run = tmp_path / "run"
    process = Process(train(run, "--engine", engine), tmp_path / "log", REFUSE, step=5, tokens=90)
    assert process.wait() == 0, process.output()
    (event,) = events(run, "out_of_memory")
    assert (event["step"], event["pieces"]) == (5, 2)
    # The effective batch is kept: but for dropout's masks, the losses stay those of the whole micro-batches.
    mine, whole = campaign.trajectory(run), campaign.trajectory(reference(engine))
    assert mine.keys() == whole.keys()
    assert all(mine[step] == whole[step] for step in range(1, 5))
    assert all(abs(mine[step][0] - whole[step][0]) < 0.05 for step in mine)


def test_memory_that_never_suffices_ends_with_a_checkpoint(train: Callable[..., list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = Process(train(run), tmp_path / "log", REFUSE, step=5, tokens=0)
    assert process.wait() == 3, process.output()
    assert "out of memory in step 5" in process.output()
    assert Checkpoints(run / "checkpoints").newest_valid() == run / "checkpoints" / "checkpoint-4"
