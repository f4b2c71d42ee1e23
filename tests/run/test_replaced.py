"""--overwrite: a run is known by its content, nothing else is ever deleted, and the old run comes back whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from slimtune.config import Config
from slimtune.errors import GuardStop, StopRequested, UserError
from slimtune.run.durable import atomic_folder
from slimtune.run.folder import RunFolder
from slimtune.run.lock import LOCK, lock_run
from slimtune.run.replaced import aside_of, check_adapter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves: one of each kind of file."""
    path = tmp_path / "runs" / "mine"
    with RunFolder.create(path) as made:
        made.write_config(Config.make(model="m", data="rows.jsonl", output=path))
        for name in ("environment.json", "facts.json", "metrics.jsonl", "ledger.jsonl", "log.txt", "report.html"):
            (path / name).write_text("{}\n")
        for name in ("stdin/stdin.json", "export/q8_0/mine-q8_0.gguf", "export/q8_0/Modelfile", "compare.json"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("x")
        made.checkpoints.mkdir()
        for folder in (made.adapter, made.checkpoints / "checkpoint-3"):
            with atomic_folder(folder) as inside:
                (inside / "adapter_model.safetensors").write_bytes(b"weights")
    return path


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def begin(run: Path, error: BaseException | None = None, *, checkpoint: bool = False) -> None:
    with RunFolder.create(run, overwrite=True) as made:
        made.log_file.write_text("the new one")
        made.write_config(Config.make(model="other", data="rows.jsonl", output=run))
        if checkpoint:
            (made.checkpoints / "checkpoint-1").mkdir(parents=True)
        if error is not None:
            raise error


def test_the_new_run_stands_once_it_has_a_checkpoint(run: Path) -> None:
    begin(run, checkpoint=True)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoints", "config.yaml", "log.txt"]
    assert [path.name for path in run.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "error",
    [UserError("bad data"), StopRequested("stopped"), GuardStop("a NaN"), RuntimeError("a fault"), KeyboardInterrupt()],
)
def test_the_old_run_is_back_after_any_failure(error: BaseException, run: Path) -> None:
    before = digest(run)
    with pytest.raises(type(error)) as caught:
        begin(run, error)
    assert digest(run) == before
    assert [path.name for path in run.parent.iterdir()] == ["mine"]
    if isinstance(error, StopRequested | GuardStop):
        assert "is back" in str(caught.value)


@pytest.mark.parametrize(
    "stranger",
    [
        "thesis.tex",
        ".git/HEAD",
        "adapter/notes.md",
        "adapter/.git/HEAD",
        "checkpoints/thesis.tex",
        "checkpoints/checkpoint-3/notes.md",
        "export/mine/thesis.tex",
        "export/q8_0/thesis.tex",
        "stdin/thesis.tex",
        "config.yaml.bak",
        "nested/config.yaml",
    ],
)
def test_what_no_run_writes_is_named_and_kept(stranger: str, run: Path) -> None:
    (run / stranger).parent.mkdir(parents=True, exist_ok=True)
    (run / stranger).write_text("years of work")
    before = digest(run)
    with pytest.raises(UserError) as caught:
        begin(run)
    assert stranger.split("/")[0] in str(caught.value)
    assert digest(run) == before


def test_a_link_in_place_of_a_folder_is_no_runs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (run / "export" / "f16").symlink_to(tmp_path / "else")
    with pytest.raises(UserError, match="export/f16"):
        begin(run)


@pytest.mark.parametrize("files", [{"config.yaml": "a: 1\n"}, {"log.txt": "mine"}, {"config.yaml": "model: [\n"},
                                   {"config.yaml": "model: x\ndata: y\n", "environment.json": "{}"},
                                   {".lock": "123\n", "log.txt": "another program's"}])  # fmt: skip
def test_a_folder_is_no_run_by_the_name_of_its_files(files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = digest(folder)
    with pytest.raises(UserError, match="no run of slimtune"):
        begin(folder)
    with pytest.raises(UserError, match="is not empty"), RunFolder.create(folder):
        pass
    assert digest(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_a_run_that_another_process_works_on_stays(run: Path) -> None:
    before = digest(run)
    with lock_run(run), pytest.raises(UserError, match="in use by process"):
        begin(run)
    assert digest(run) == before


def test_a_mount_is_named_before_anything_moves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mount:
        mountpoint = str(run / "checkpoints")

    monkeypatch.setattr(psutil, "disk_partitions", lambda **options: [Mount])
    before = digest(run)
    with pytest.raises(UserError, match="checkpoints is mounted"):
        begin(run)
    assert digest(run) == before


def test_a_rename_that_fails_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(run)

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(UserError, match="Operation not permitted"):
            begin(run)
    assert digest(run) == before


def test_a_link_to_a_run_stays_a_link(run: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(run)
    before = digest(run)
    with pytest.raises(RuntimeError):
        begin(link, RuntimeError())
    assert link.is_symlink()
    assert digest(run) == before
    begin(link, checkpoint=True)
    assert link.is_symlink()
    assert (run / "log.txt").read_text() == "the new one"


KILLED = """
import os, signal, sys
from pathlib import Path
from slimtune.run import replaced
from slimtune.run.folder import RunFolder

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "mkdir":
    Path.mkdir = die
with RunFolder.create(Path(sys.argv[1]), overwrite=True) as run:
    run.log_file.write_text("new")
    die()
"""


def kill(run: Path, where: str) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(run), where]).returncode == -signal.SIGKILL


@pytest.mark.parametrize("where", ["mkdir", "body"])
@pytest.mark.parametrize("then", ["open", "refused", "again"])
def test_a_kill_half_way_loses_nothing(where: str, then: str, run: Path) -> None:
    before = digest(run)
    kill(run, where)
    assert digest(aside_of(run)) == before
    steps: dict[str, Callable[[], object]] = {
        "open": lambda: RunFolder.open(run),
        "refused": lambda: RunFolder.create(run).__enter__(),
        "again": lambda: begin(run, UserError("bad data")),
    }
    with pytest.raises(UserError, match="the old one is back" if then == "open" else "."):
        steps[then]()
    assert digest(run) == before
    assert not aside_of(run).exists()
    assert RunFolder.open(run).has_checkpoint


def test_a_live_process_is_not_taken_for_a_dead_one(run: Path) -> None:
    with RunFolder.create(run, overwrite=True) as made:
        made.write_config(Config.make(model="other", data="rows.jsonl", output=run))
        assert RunFolder.open(run).config().model == "other"
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), RunFolder.create(run, overwrite=True):
            pass
        (made.checkpoints / "checkpoint-1").mkdir(parents=True)


def test_from_inside_the_run_it_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    with pytest.raises(UserError, match="inside it"):
        begin(run)


def test_an_empty_folder_stays_and_is_empty_again(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(UserError, match="bad"):
        begin(folder, UserError("bad"))
    assert list(folder.iterdir()) == []


def test_a_resumed_run_writes_over_nothing_that_it_did_not_write(run: Path) -> None:
    check_adapter(run / "adapter")
    check_adapter(run / "absent")
    (run / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is nothing that the run wrote"):
        check_adapter(run / "adapter")
