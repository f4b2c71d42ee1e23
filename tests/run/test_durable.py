"""A folder is whole or absent after a kill at any operation, damage is found, journals survive a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slimtune.errors import UserError
from slimtune.run import durable
from slimtune.run.durable import SUMS, DamagedError, JsonLines, atomic_folder, verify, write_file

OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "truncate", "ftruncate")


class KillAfter:
    """Stands for :mod:`os` in the durable module and ends the process with SIGKILL after the n-th operation."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def operation(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation


def write(final: Path, content: bytes) -> None:
    with atomic_folder(final) as folder:
        for name in ("a.json", "b.safetensors", "c.json"):
            write_file(folder / name, content + name.encode())


def test_what_was_written_is_there(tmp_path: Path) -> None:
    write(tmp_path / "x", b"one")
    verify(tmp_path / "x")
    assert (tmp_path / "x" / "a.json").read_bytes() == b"onea.json"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_sums_are_in_sha256sum_format(tmp_path: Path) -> None:
    write(tmp_path / "x", b"one")
    check = ["sha256sum", "--check", "--strict", SUMS]
    good = subprocess.run(check, cwd=tmp_path / "x", capture_output=True, text=True, check=False)
    assert good.returncode == 0
    assert good.stdout.splitlines() == ["a.json: OK", "b.safetensors: OK", "c.json: OK"]
    (tmp_path / "x" / "b.safetensors").write_bytes(b"other")
    bad = subprocess.run(check, cwd=tmp_path / "x", capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "b.safetensors: FAILED" in bad.stdout


def test_a_kill_after_any_operation_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    count = 0
    while True:
        count += 1
        parent = tmp_path / str(count)
        parent.mkdir()
        write(parent / "checkpoint-1", b"old")
        child = os.fork()
        if child == 0:
            durable.os = KillAfter(count)  # type: ignore[attr-defined]
            write(parent / "checkpoint-2", b"new")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        verify(parent / "checkpoint-1")
        if (parent / "checkpoint-2").exists():
            verify(parent / "checkpoint-2")
            assert (parent / "checkpoint-2" / "c.json").read_bytes() == b"newc.json"
        durable.remove_leftovers(parent)
        assert not list(parent.glob(".*"))
        if os.WIFEXITED(status):
            break
    assert count > 20
    verify(parent / "checkpoint-2")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("operation", ["open", "write", "fsync", "mkdir", "rename", "close"])
def test_a_failing_operation_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    write(tmp_path / "x", b"old")

    class Failing:
        left = 2

        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                Failing.left -= 1
                if Failing.left <= 0:
                    if name == "close":
                        real(*args)
                    raise OSError(number, os.strerror(number))
                return real(*args, **kwargs)

            return call if name == operation else real

    if operation in ("mkdir", "rename"):
        Failing.left = 1
    monkeypatch.setattr(durable, "os", Failing())
    with pytest.raises(OSError, match=os.strerror(number)):
        write(tmp_path / "x", b"new")
    monkeypatch.undo()
    verify(tmp_path / "x")
    assert (tmp_path / "x" / "a.json").read_bytes() == b"olda.json"


def test_any_damage_is_found_and_named(tmp_path: Path) -> None:
    random.seed(0)
    for trial in range(120):
        folder = tmp_path / str(trial)
        write(folder, bytes(random.randrange(256) for _ in range(200)))
        victim = random.choice(sorted(folder.iterdir()))
        data = bytearray(victim.read_bytes())
        kind = trial % 4
        if kind == 0:
            victim.write_bytes(data[: random.randrange(len(data))])
        elif kind == 1:
            bit = random.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            victim.write_bytes(data)
        elif kind == 2:
            victim.unlink()
        else:
            (folder / "stranger").write_bytes(b"x")
            victim = folder / "stranger"
        with pytest.raises(DamagedError) as damage:
            verify(folder)
        if victim.name != SUMS:
            assert damage.value.file == victim.name


def test_links_and_pipes_are_damage(tmp_path: Path) -> None:
    write(tmp_path / "x", b"one")
    (tmp_path / "outside").write_bytes((tmp_path / "x" / "a.json").read_bytes())
    (tmp_path / "x" / "a.json").unlink()
    (tmp_path / "x" / "a.json").symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedError, match=r"a\.json"):
        verify(tmp_path / "x")
    (tmp_path / "x" / "a.json").unlink()
    os.mkfifo(tmp_path / "x" / "a.json")
    with pytest.raises(DamagedError, match=r"a\.json"):
        verify(tmp_path / "x")


def test_every_file_is_synced_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []

    class Recording:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in ("fsync", "rename"):
                return real

            def call(*args: Any) -> Any:
                what = str(Path(f"/proc/self/fd/{args[0]}").readlink() if name == "fsync" else args[1])
                log.append((name, what))
                return real(*args)

            return call

    monkeypatch.setattr(durable, "os", Recording())
    write(tmp_path / "x", b"one")
    renamed = log.index(("rename", str(tmp_path / "x")))
    partial = str(tmp_path / ".x.partial")
    synced = {what for name, what in log[:renamed] if name == "fsync"}
    assert {partial, *(f"{partial}/{name}" for name in ("a.json", "b.safetensors", "c.json", SUMS))} <= synced
    assert ("fsync", str(tmp_path)) in log[renamed:]


def test_a_journal_keeps_its_lines_in_memory_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JsonLines(tmp_path / "metrics.jsonl")
    journal.append({"step": 1})

    class Full:
        def __getattr__(self, name: str) -> Any:
            if name != "write":
                return getattr(os, name)
            return lambda descriptor, data: os.write(descriptor, data[:3])  # what a full disk does: a short write

    monkeypatch.setattr(durable, "os", Full())
    journal.append({"step": 2})
    journal.append({"step": 3})
    assert journal.error is not None
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    monkeypatch.undo()
    journal.append({"step": 4})
    assert journal.error is None
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    JsonLines(tmp_path / "metrics.jsonl").append({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_who_may_read_a_file_is_the_umasks_to_say(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with durable.atomic_folder(tmp_path / "made") as folder:
            durable.write_file(folder / "file", b"x")
            save_file({"a": torch.zeros(3)}, folder / "weights")
        durable.replace_file(tmp_path / "text", "x")
        durable.JsonLines(tmp_path / "lines").append({})
    finally:
        os.umask(before)
    names = ("made/file", "made/weights", f"made/{durable.SUMS}", "text", "lines")
    for path in (tmp_path / name for name in names):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o777 & ~mask


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.replace_file(tmp_path / "text", "old")

    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "text"))):
        durable.replace_file(tmp_path / "text", "new")
    monkeypatch.undo()
    assert (tmp_path / "text").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_folder_that_takes_no_file_is_told_before_anything_is_done(tmp_path: Path) -> None:
    durable.check_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing can be written into"):
        durable.check_writable(tmp_path / "file" / "folder")
