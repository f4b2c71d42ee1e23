"""Each file operation of a save, one by one: a kill after it, and a full or failing disk instead of it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from slimtune.run import durable
from slimtune.run.durable import verify
from slimtune.training.checkpoint import Checkpoints, Snapshot, read_checkpoint
from tests.campaigns import campaign
from tests.campaigns.faults import Operations
from tests.training.small import SmallRun, small_run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def whole(tmp_path: Path) -> SmallRun:
    run = small_run(tmp_path / "whole")
    run.fit()
    return run


def stopped_before_a_save(folder: Path) -> tuple[Path, Snapshot]:
    """A run with checkpoints 3 and 6, and what its save of step 9 would write."""
    run = small_run(folder)
    taken: list[Snapshot] = []
    save = run.safety.checkpoints.save

    def keep(step: int, snapshot: Callable[[], Snapshot]) -> None:
        if step == 9:
            taken.append(snapshot())
            raise InterruptedError
        save(step, snapshot)

    run.safety.checkpoints.save = keep  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        run.fit()
    assert Checkpoints(folder / "checkpoints").steps() == [6, 3]
    return folder, taken[0]


def save_with(folder: Path, snapshot: Snapshot, operations: Operations) -> Checkpoints:
    """The save of ``snapshot`` in this thread, prune included, over ``operations``."""
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.last_saved = 6
    durable.os = operations  # type: ignore[attr-defined]
    try:
        checkpoints._save(snapshot.step, lambda: snapshot)
    finally:
        durable.os = os  # type: ignore[attr-defined]
    return checkpoints


def operations_of_a_save(folder: Path, snapshot: Snapshot, tmp_path: Path) -> list[tuple[str, str]]:
    shutil.copytree(folder, tmp_path / "traced")
    operations = Operations(0, lambda: None)
    save_with(tmp_path / "traced", snapshot, operations)
    assert Checkpoints(tmp_path / "traced" / "checkpoints").steps() == [9, 6]
    names = Counter(name for name, _ in operations.log)
    assert names["rename"] == 2, names  # the new one in, the old one out
    assert names["unlink"] >= 7, names
    return operations.log


def test_a_kill_after_each_operation(whole: SmallRun, tmp_path: Path) -> None:
    folder, snapshot = stopped_before_a_save(tmp_path / "stopped")
    log = operations_of_a_save(folder, snapshot, tmp_path)
    new = snapshot.files()
    old = read_checkpoint(folder / "checkpoints" / "checkpoint-6").files()
    taken: Counter[int] = Counter()
    resumed = 0
    for at in range(1, len(log) + 1):
        trial = tmp_path / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(folder, trial)
        child = os.fork()
        if child == 0:
            save_with(trial, snapshot, Operations(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"operation {at} of {len(log)} wasn't reached"
        newest = Checkpoints(trial / "checkpoints").newest_valid()
        assert newest is not None
        step = int(newest.name.rpartition("-")[2])
        expected = new if step == 9 else old
        assert {path.name: path.read_bytes() for path in newest.iterdir() if path.name != durable.SUMS} == expected
        taken[step] += 1
        if at % campaign.count(5, 30) == 0:
            run = small_run(trial)
            run.fit()
            assert run.digest() == whole.digest()
            resumed += 1
    assert set(taken) == {6, 9}
    campaign.record(
        "operations-kill",
        {
            "operations": len(log),
            "kills": sum(taken.values()),
            "previous_taken": taken[6],
            "new_taken": taken[9],
            "resumed_equal": resumed,
            "by_operation": dict(Counter(name for name, _ in log)),
        },
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_at_each_operation(whole: SmallRun, tmp_path: Path, number: int) -> None:
    folder, snapshot = stopped_before_a_save(tmp_path / "stopped")
    log = operations_of_a_save(folder, snapshot, tmp_path)

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    told = 0
    tried = range(1, len(log) + 1, campaign.count(1, 7))
    for at in tried:
        trial = tmp_path / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(folder, trial)
        checkpoints = save_with(trial, snapshot, Operations(at, fail, instead=True))
        whole_ones = [step for step in checkpoints.steps() if is_whole(checkpoints.path(step))]
        assert 6 in whole_ones, "the older checkpoint stays"
        assert len(whole_ones) >= 2, whole_ones
        if checkpoints.failure is None:
            assert 9 in whole_ones  # the failure was in clearing up; the checkpoint is there
        else:
            told += 1
            assert checkpoints.failure.error.errno in (number, errno.EIO)  # EIO: it could not be read back
        # There is room again: the same save comes off.
        checkpoints._save(snapshot.step, lambda: snapshot)
        assert checkpoints.failure is None
        assert Checkpoints(trial / "checkpoints").newest_valid() == checkpoints.path(9)
    campaign.record(
        f"operations-{errno.errorcode[number]}", {"operations": len(tried), "lost": 0, "told_as_failed_saves": told}
    )


def is_whole(path: Path) -> bool:
    try:
        verify(path)
    except durable.DamagedError:
        return False
    return True
