"""One process to a run folder: a lock that dies with its owner, and a file by which others ask it to stop."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimtune.errors import UserError

__all__ = ["LOCK", "STOP", "ask_to_stop", "is_asked", "is_locked", "is_run_lock", "lock_run", "take_request"]

LOCK = ".lock"
STOP = "stop"
_PATIENCE, _AGAIN = 0.5, 0.02
"""Seconds for which a lock that is held is tried, and from one try to the next: who only looks holds it a moment."""
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
        deadline = time.monotonic() + _PATIENCE
        while not _taken(descriptor, fcntl.LOCK_EX) and time.monotonic() < deadline:
            time.sleep(_AGAIN)
        if not _taken(descriptor, fcntl.LOCK_EX):
            owner = os.pread(descriptor, 32, 0).decode("ascii", errors="replace").partition(" ")[0].strip()
            raise UserError(
                f"run {folder} is in use by process {owner or 'unknown'}",
                rule="One process works on a run at a time.",
                way_out="Wait until it ends, or stop it (SIGTERM: it saves and can be resumed).",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} slimtune\n".encode(), 0)
        take_request(folder)  # of who asked the process before this one
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
        return not _taken(descriptor, fcntl.LOCK_SH)  # shared: others that look aren't in the way
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ask_to_stop(folder: Path) -> None:
    """Ask whichever process works on the run, on whatever machine, to save and stop at the end of its step.

    Raises:
        OSError: The file can't be made.
    """
    os.close(os.open(folder / STOP, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666))


def is_asked(folder: Path) -> bool:
    """Whether that was asked, and not heard yet."""
    return os.path.lexists(folder / STOP)


def take_request(folder: Path) -> bool:
    """Whether that was asked; from here on it isn't any more."""
    if not is_asked(folder):
        return False
    with suppress(OSError):  # a folder that can't be written any more: it was asked all the same
        os.unlink(folder / STOP)  # noqa: PTH108 - at every step
    return True


def is_run_lock(file: Path) -> bool:
    """Whether ``file`` is a lock of slimtune's, not one of the same name that another program left."""
    return file.is_file() and _WRITTEN.fullmatch(file.read_bytes()[:64]) is not None
