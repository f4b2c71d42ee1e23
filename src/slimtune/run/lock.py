"""One process to a run folder: a lock that dies with its owner."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimtune.errors import UserError

__all__ = ["LOCK", "is_locked", "is_run_lock", "lock_run"]

LOCK = ".lock"
_WRITTEN = re.compile(rb"\d+ slimtune\n")


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process while the body runs.

    The kernel drops the lock (``flock``) when the process ends in whatever way, so no stale lock is ever left; the file
    itself stays and means nothing.

    Raises:
        UserError: Another process holds the run; it is named by its id. Or the lock can't be made there.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(
            f"run {folder} can't be locked: {error.strerror} ({folder / LOCK})",
            rule="Who goes on with a run, or writes over it, must be allowed to write into it.",
            way_out="Copy the folder and give the copy, or choose another folder (-o).",
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", errors="replace").partition(" ")[0].strip()
            raise UserError(
                f"run {folder} is in use by process {owner or 'unknown'}",
                rule="One process works on a run at a time.",
                way_out="Wait until it ends, or stop it (SIGTERM: it saves and can be resumed).",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} slimtune\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run in ``folder``."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def is_run_lock(file: Path) -> bool:
    """Whether ``file`` is a lock of slimtune's, not one of the same name that another program left."""
    return file.is_file() and _WRITTEN.fullmatch(file.read_bytes()[:64]) is not None
