"""Two processes on one run: the second is refused, and a dead owner holds nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.run.lock import LOCK, STOP, ask_to_stop, is_asked, is_locked, lock_run, take_request

HOLD = """
import sys, time
from pathlib import Path
from slimtune.run.lock import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {owner.pid}"), lock_run(tmp_path):
            pass
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with lock_run(tmp_path):  # it died with its owner
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()} slimtune\n"


def is_held(folder: Path) -> bool:
    """Asked of the kernel, through another open file."""
    with (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_lock_is_held_in_the_body_and_free_after_it(tmp_path: Path) -> None:
    held = []
    for _ in range(2):
        with lock_run(tmp_path):
            held.append(is_held(tmp_path))
        held.append(is_held(tmp_path))
    assert held == [True, False, True, False]


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match=r"can't be locked: Is a directory \(.*\.lock\)"), lock_run(tmp_path):
        pass


def test_who_looks_sees_the_owner_alone_and_is_in_nobodys_way(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with lock_run(tmp_path):
        assert is_locked(tmp_path)
    with (tmp_path / LOCK).open() as looking:  # as is_locked does, for longer
        fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not is_locked(tmp_path)
        release = threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN))
        release.start()
        with lock_run(tmp_path):
            assert is_held(tmp_path)
        release.join()


def test_a_request_to_stop_is_heard_once_and_is_the_sessions_own(tmp_path: Path) -> None:
    assert not take_request(tmp_path)
    ask_to_stop(tmp_path)
    ask_to_stop(tmp_path)
    with lock_run(tmp_path):
        assert not is_asked(tmp_path)  # the session before this one was meant
        (tmp_path / STOP).touch()  # by hand
        assert is_asked(tmp_path)
        assert take_request(tmp_path)
        assert not take_request(tmp_path)
