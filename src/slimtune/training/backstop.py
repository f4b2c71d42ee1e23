"""What stands behind the watchdog and behind the stop signals: a process of its own, for code that hangs while it holds
the interpreter's lock.

Nothing in a process can count how long it itself was stopped (Ctrl-Z, a frozen container): every clock and timer that
it could read goes on, faulthandler's too, which then ends it on waking. So another process counts, in beats of its own,
and leaves out those in which the watched one is stopped.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from slimtune.words import told

__all__ = ["Backstop", "Unheard"]

_DUMP = signal.SIGRTMIN + 5
"""The signal whose C handler writes the stacks; no lock is needed for that."""
_LOOK = 0.2
"""Seconds from one look at the pipe to the next."""

_BOTH = """
import os, select, signal, sys, time
pid, tick, most = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)  # a run that is asked to stop goes on for a while

def runs():
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] not in ("T", "t")

idle = 0
"""

_COUNTER = """
dump, words = int(sys.argv[4]), sys.argv[5]
while idle < most:
    if select.select([0], [], [], tick)[0]:
        if not os.read(0, 4096):
            sys.exit()
        idle = 0
        continue
    if os.getppid() != pid:
        sys.exit()
    idle += runs()
sys.stderr.write(words)
sys.stderr.flush()
os.kill(pid, dump)
time.sleep(min(5.0, 10 * tick))
os.kill(pid, signal.SIGKILL)
"""

_UNHEARD = """
pipe, words = int(sys.argv[4]), sys.argv[5]
while idle < most:
    if select.select([0], [], [], tick)[0] or os.getppid() != pid:
        sys.exit()
    idle = idle + runs() if select.select([pipe], [], [], 0)[0] else 0
sys.stderr.write(words)
sys.stderr.flush()
os.kill(pid, signal.SIGKILL)
"""


class Backstop:
    """Kills this process, its stacks written, when :meth:`beat` isn't called for a time in which it ran.

    Args:
        tick: Seconds from one look to the next.
        seconds: How long to wait for a beat.
        stacks: Where the stacks go; an open file.
    """

    def __init__(self, tick: float, seconds: float, stacks: IO[str]) -> None:
        faulthandler.register(_DUMP, file=stacks, all_threads=True)
        said = told(f"Python itself hangs since {seconds:.0f} s. All threads' stacks are in {stacks.name}.")
        words = f"slimtune: {said}\n"
        values = (tick, max(1, round(seconds / tick)), int(_DUMP), words)
        self._counter = _beside(_COUNTER, values)
        assert self._counter.stdin is not None
        self._pipe = self._counter.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def beat(self) -> None:
        """Python runs."""
        with suppress(BlockingIOError, BrokenPipeError):  # it has beats enough, or somebody ended it
            os.write(self._pipe, b".")

    def close(self) -> None:
        """Count no more."""
        assert self._counter.stdin is not None
        self._counter.stdin.close()
        self._counter.wait()
        faulthandler.unregister(_DUMP)


class Unheard:
    """Kills this process when what a signal wrote into the wake-up pipe isn't read for a time in which the process ran:
    then no thread of it gets to run Python.

    Args:
        pipe: The pipe's end to read, which a thread of this process reads.
        seconds: How long it may lie unread.
    """

    def __init__(self, pipe: int, seconds: float) -> None:
        words = f"slimtune: {told(f'asked to stop, and Python itself hangs since {seconds:.0f} s: killed')}\n"
        self._looker = _beside(_UNHEARD, (_LOOK, round(seconds / _LOOK), pipe, words), pipe)

    def close(self) -> None:
        """Look no more."""
        assert self._looker.stdin is not None
        self._looker.stdin.close()
        self._looker.wait()


def _beside(program: str, values: Sequence[object], *pipes: int) -> subprocess.Popen[bytes]:
    """A Python of its own that sees to this process, until its input is closed."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOTH + program, str(os.getpid()), *map(str, values)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=pipes,
    )
