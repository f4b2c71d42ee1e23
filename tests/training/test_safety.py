"""What the system refuses before, in and after the training: a message about the file, and never a lost run."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slimtune import prepare, recipes
from slimtune.config import Config
from slimtune.errors import GuardStop, StopRequested, UserError
from slimtune.recipes import finetune, resume
from slimtune.run.folder import RunFolder
from slimtune.training.resumable import ResumableTrainer
from tests.campaigns import campaign


class FailingDisk:
    """Makes the n-th file or folder that is opened for writing below a folder fail, as a full disk does."""

    def __init__(self) -> None:
        self.below, self.at, self.seen = "", 0, 0
        self.failed = ""
        sys.addaudithook(self._see)  # a hook stays for the process's life; ``below`` turns it off

    def arm(self, below: Path, at: int) -> None:
        self.below, self.at, self.seen, self.failed = str(below), at, 0, ""

    def disarm(self) -> None:
        self.below = ""

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.below or event not in ("open", "os.mkdir"):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        writes = event == "os.mkdir" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not path.startswith(self.below) or not writes:
            return
        self.seen += 1
        if self.seen == self.at:
            self.failed = path
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.fixture(scope="module")
def disk() -> FailingDisk:
    return FailingDisk()


@pytest.fixture
def failing(disk: FailingDisk) -> Iterator[FailingDisk]:
    yield disk
    disk.disarm()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return campaign.make_model(folder / "model"), campaign.make_rows(folder / "rows.jsonl", 12)


MakeConfig = Callable[..., Config]


@pytest.fixture
def config(parts: tuple[Path, Path], tmp_path: Path) -> MakeConfig:
    def make(name: str = "run", **more: Any) -> Config:
        values = {"max_steps": 2, "max_length": 128, "learning_rate": 1e-2, "compute_dtype": "fp32", **more}
        return Config.make(model=str(parts[0]), data=(str(parts[1]),), output=tmp_path / name, **values)

    return make


def test_every_write_before_the_first_step_that_fails_is_named(
    config: MakeConfig, tmp_path: Path, failing: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TrainingBegan(Exception):
        pass

    def fit(self: ResumableTrainer) -> None:
        raise TrainingBegan

    monkeypatch.setattr(ResumableTrainer, "fit", fit)
    named: list[str] = []
    while True:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{len(named)}"))  # nothing was proven before
        failing.arm(tmp_path, len(named) + 1)
        try:
            with pytest.raises(UserError) as refused:
                finetune(config())
        except TrainingBegan:
            break
        assert refused.value.exit_code == 2
        assert failing.failed in str(refused.value)
        assert not list(tmp_path.glob("run/*"))
        named.append(Path(failing.failed).name)
    written = {"run", ".lock", "stacks.txt", "log.txt", "ledger.jsonl", "checkpoints", ".config.yaml.tmp",
               ".environment.json.tmp", ".facts.json.tmp", "slimtune", "facts.json"}  # fmt: skip
    assert written <= set(named), named


def test_a_run_that_was_stopped_while_set_up_is_begun_by_the_same_command(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise StopRequested("stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_base", stopped)
        with pytest.raises(StopRequested):
            finetune(config())
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {".lock", "log.txt", "ledger.jsonl"}
    assert finetune(config()).config_file.is_file()


def test_a_strangers_log_is_no_run_that_was_set_up(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        finetune(config())
    assert (tmp_path / "run" / "log.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (UserError("the base is gone", way_out="Put it back."), UserError, "the base is gone"),
        (
            OSError(errno.EIO, "Input/output error", "adapter"),
            GuardStop,
            "results can't be written: adapter: Input/output",
        ),
        (
            Exception("No space left on device (os error 28)"),
            GuardStop,
            "results can't be written: a file can't be .* No space",
        ),
    ],
)
def test_a_mistake_after_the_training_keeps_the_run(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type, message: str
) -> None:
    def fails(*args: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "issue_passport", fails)
        with pytest.raises(expected, match=message) as told:
            finetune(config())
    assert f"slimtune resume {tmp_path / 'run'}" in str(told.value)
    run = resume(tmp_path / "run")
    assert max(campaign.trajectory(run.path)) == 2
    assert run.read_json(run.facts_file)["verified"]["outputs_differ"]
    assert run.read_json(run.facts_file)["training"]["repeats"]


@pytest.mark.parametrize("made_of_it", [None, OSError(errno.EINTR, "Interrupted system call")])
def test_a_signal_while_the_results_are_written_is_a_stop(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_of_it: Exception | None
) -> None:
    def interrupted(*args: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except StopRequested as stop:
            raise made_of_it or stop from None

    monkeypatch.setattr(recipes, "issue_passport", interrupted)
    with pytest.raises(StopRequested, match=f"slimtune resume {tmp_path / 'run'}"):
        finetune(config())
    assert RunFolder(tmp_path / "run").has_checkpoint


def test_a_disk_that_fails_in_the_training_keeps_the_checkpoint(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ResumableTrainer._before_optimizer

    def before_optimizer(self: ResumableTrainer) -> None:
        if self.state.global_step == 1:
            self.safety.checkpoints.wait()
            raise OSError(errno.EIO, os.strerror(errno.EIO), "events.out")
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableTrainer, "_before_optimizer", before_optimizer)
        with pytest.raises(UserError, match=r"events.out: Input/output error") as told:
            finetune(config(save_steps=1))
    assert f"slimtune resume {tmp_path / 'run'}" in str(told.value)
    assert RunFolder(tmp_path / "run").has_checkpoint
