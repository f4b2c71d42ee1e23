"""Stopping on request and stopping a hang: signals, and a watchdog. Standard library only.

The first SIGTERM, SIGINT or SIGUSR1 asks: training saves at the end of the step, every other phase ends where it is,
within seconds, whatever it waits for; the exit code is 75. Before the first step that holds even where a library keeps
the interpreter's lock: then another process kills this one (:class:`slimtune.training.backstop.Unheard`). The second
signal ends the process at once. All are safe because everything on disk is written whole or not at all
(:mod:`slimtune.run.durable`).
"""

from __future__ import annotations

import faulthandler
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from slimtune.errors import GuardStop, StopRequested
from slimtune.training.backstop import Backstop, Unheard
from slimtune.words import told

__all__ = ["STOP_SIGNALS", "StopSignals", "Watchdog", "end_anyway"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GRACE = 4.0
"""Seconds that a phase which ends where it is has for that; what it waits for (a network, a disk, other processes) may
never come."""
_COPIES = 2.0
"""Seconds in which a launcher passes on a signal that its processes have heard already."""
_LOOK = 0.2
"""Seconds from one look to the next whether it has ended."""


def end_anyway() -> None:
    """End this process in a moment, whatever its threads wait for: it is on its way out after a signal."""
    timer = threading.Timer(_GRACE, os._exit, (StopRequested.exit_code,))
    timer.daemon = True
    timer.start()


def _exit(why: StopRequested | None = None) -> NoReturn:
    """Say why, and end the process without unwinding. A bar or a spinner that is shown keeps its line, and gives the
    cursor back."""
    with suppress(OSError, ValueError):  # nobody reads any more
        if why is not None:
            sys.stderr.write("slimtune: " + "\n".join(why.said()) + "\n")
        sys.stderr.flush()
        if os.isatty(2):
            os.write(2, b"\n\x1b[?25h")  # past Rich, which has put its own in the place of sys.stderr
    os._exit(StopRequested.exit_code)


def _resume(run: Path | None) -> str:
    return f"slimtune resume {shlex.quote(str(run))}"


def _way_on(run: Path | None) -> str:
    """What to do after a stop; ``run``: the run's folder once there is something to go on from."""
    return "Give the same command again." if run is None else f"Go on: {_resume(run)}"


class StopSignals:
    """Catch the stop signals while the ``with`` body runs; the handlers that were there come back after it.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        run: See :attr:`run`.
        rank: Of this process among several; None: it is alone. Rank 0 says that a signal was heard. A launcher passes
            signals on, and a rank may have heard them by itself, as Slurm and systemd send them to all processes of a
            job: what comes within two seconds of the first is a copy of it.

    Raises:
        StopRequested: A signal came, and the body didn't end well by itself.
    """

    def __init__(self, run: Path | None = None, *, rank: int | None = None) -> None:
        self._silent, self._copies = bool(rank), 0.0 if rank is None else _COPIES
        self.run = run
        """The run's folder once there is something to go on from; it makes the message."""
        self.finished = False
        """Whether all that the run is for lies on the disk: then there is nothing to go on with."""
        self.requested: str | None = None
        """What asked for the stop: a signal's name, or another way of asking."""
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._unheard: Unheard | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers between bytecodes of the main thread, which may sit in a long kernel. The wake-up
            # pipe is written by the C handler at once, so a thread sees a second signal in any case.
            read, write = os.pipe()
            os.set_blocking(write, False)
            self._wakeup, self._wakeup_before = (read, write), signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read,), name="stop-signals", daemon=True).start()
            self._unheard = Unheard(read, _GRACE)
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._listen_alone()
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup[1])
            self._wakeup = None
        if self.requested is not None and error is not None and not isinstance(error, StopRequested | GuardStop):
            # Libraries catch what a signal raises in the middle of them, and raise what they make of it.
            raise self.stop() from error

    @contextmanager
    def deferrable(self) -> Iterator[None]:
        """Inside, once :meth:`defer` is called, a signal only sets :attr:`requested`: the body looks at it where it can
        stop well. Until then it stops where it is, for nothing has been done that could be saved.

        Raises:
            StopRequested: A signal came, before the body or in it.
        """
        self.check()
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def defer(self) -> None:
        """From here on the body of :meth:`deferrable` stops by itself.

        Raises:
            StopRequested: A signal came before, and a library has kept it to itself.
        """
        if not self._deferred:
            self.check()
            self._deferred = True
            self._listen_alone()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """:meth:`deferrable`, with all of its body deferred."""
        with self.deferrable():
            self.defer()
            yield

    def check(self) -> None:
        """Stop here if a signal came.

        Raises:
            StopRequested: A signal came.
        """
        if self.requested is not None:
            raise self.stop()

    def stop(self, where: str = "") -> StopRequested:
        """The error that says what stopped the run and how to go on."""
        name = self.requested or "a request"
        if self.finished:
            return StopRequested(f"stopped by {name}, when all was done", way_out=f"The run is whole: {self.run}")
        return StopRequested(f"stopped by {name}{where}", way_out=_way_on(self.run))

    @property
    def resume(self) -> str:
        """The command that goes on with the run."""
        return _resume(self.run)

    def _listen_alone(self) -> None:
        """From the first step on a signal waits for the step's end, however long that takes."""
        if self._unheard is not None:
            self._unheard.close()
            self._unheard = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
            if not self._deferred:
                raise self.stop()

    def _watch(self, read: int) -> None:
        seen, waited, first = 0, 0.0, 0.0
        while True:
            if select.select([read], [], [], _LOOK if seen else None)[0]:
                data = os.read(read, 64)
                if not data:
                    break
                before, heard = seen, sum(number in STOP_SIGNALS for number in data)
                first = time.monotonic() if heard and not before else first
                copies = bool(self._copies) and time.monotonic() - first < self._copies
                seen = max(before, min(1, heard)) if copies else before + heard
                if seen == 1 and not before and self._deferred and not self._silent:
                    line = told("slimtune: stopping: the step is ended and saved first; again ends at once")
                    sys.stderr.write(f"{line}\n")
                    sys.stderr.flush()
            elif not self._deferred:
                waited += _LOOK
            if seen > 1:
                _exit()
            if waited >= _GRACE:
                _exit(self.stop(f", and did not end by itself within {_GRACE:.0f} s"))
        os.close(read)


class Watchdog:
    """Ends a process that makes no progress: writes all threads' stacks, then exits 75.

    Progress is told by :meth:`beat` under a name for each activity (``"a step"``, ``"a save"``); an activity that is
    over is taken out by :meth:`rest`. When the last beat of any activity is older than ``seconds``, the stacks go to
    ``stacks``, and the process ends without unwinding (its threads hang, after all).

    Time in which the process was stopped (Ctrl-Z) doesn't count: the watching thread sees that it slept longer than it
    meant to. It needs Python's interpreter lock; for code that hangs while it holds the lock, a process of its own
    stands behind it, and kills after twice the time (:mod:`slimtune.training.backstop`).
    """

    def __init__(self, seconds: float, stacks: Path, *, run: Path | None = None) -> None:
        self.seconds, self.stacks = seconds, stacks
        self.run = run
        """The run's folder once there is something to go on from; it makes the message."""
        self._beats: dict[str, float] = {}
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._file: Any = None
        self._tick = min(1.0, seconds / 10)
        self._backstop: Backstop | None = None

    def __enter__(self) -> Self:
        if self.seconds > 0:
            # Opened now: on a full disk, or one that hangs, it couldn't be opened later.
            self._file = self.stacks.open("a", encoding="utf-8")
            self._backstop = Backstop(self._tick, 2 * self.seconds, self._file)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._closed.set()
        if self._backstop is not None:
            self._backstop.close()
            self._file.close()
            self._file = None
            with suppress(OSError):  # an empty file that stays is no fault; the run's own error is what counts
                if self.stacks.stat().st_size == 0:
                    self.stacks.unlink()

    def beat(self, activity: str) -> None:
        """``activity`` made progress."""
        self._beats[activity] = time.monotonic()

    def rest(self, activity: str) -> None:
        """``activity`` is over; it is not waited for."""
        self._beats.pop(activity, None)

    @contextmanager
    def watching(self, activity: str) -> Iterator[None]:
        """``activity`` is what the body does."""
        self.beat(activity)
        try:
            yield
        finally:
            self.rest(activity)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            slept, before = now - before - self._tick, now
            with self._lock:
                if self._closed.is_set():
                    return
                assert self._backstop is not None
                self._backstop.beat()
                for activity, last in list(self._beats.items()):
                    if slept > self._tick:  # so did all else in this process
                        self._beats[activity] = last = min(now, last + slept)
                    if now - last > self.seconds:
                        self._end(activity, now - last)

    def _end(self, activity: str, idle: float) -> None:
        why = StopRequested(
            f"no progress in {activity} for {idle:.0f} s (watchdog: {self.seconds:g} s)",
            rule=f"All threads' stacks are in {self.stacks}.",
            way_out=_way_on(self.run),
        )
        # In a thread: a disk that hangs may be what the run hangs in.
        writer = threading.Thread(target=self._write_stacks, args=(f"slimtune: {why}\n",), daemon=True)
        writer.start()
        writer.join(min(10.0, self.seconds))
        _exit(why)

    def _write_stacks(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        os.fsync(self._file.fileno())
