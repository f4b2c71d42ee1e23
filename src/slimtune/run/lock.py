"""One process to a run folder: a lock that dies with its owner."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimtune.errors import UserError

__all__ = ["LOCK", "lock_run"]

LOCK = ".lock"


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process while the body runs.

    The kernel drops the lock (``flock``) when the process ends in whatever way, so no stale lock is ever left; the file
    itself stays and means nothing.

    Raises:
        UserError: Another process holds the run; it is named by its id. Or the lock can't be made there.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"run {folder} can't be locked: {error.strerror} ({folder / LOCK})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", errors="replace").strip()
            raise UserError(
                f"run {folder} is in use by process {owner or 'unknown'}",
                rule="One process works on a run at a time.",
                way_out="Wait until it ends, or stop it (SIGTERM: it saves and can be resumed).",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
