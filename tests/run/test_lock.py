"""Two processes on one run: the second is refused, and a dead owner holds nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.run.lock import lock_run

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
        pass


def test_the_lock_is_free_after_the_body(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_run(tmp_path):
            pass
