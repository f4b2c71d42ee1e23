"""A run that is looked at while it goes: what its folder says now, read as it grows. No other truth is kept.

The same holds for a run that has ended, was stopped, killed or resumed, and for a folder that isn't there yet or any
more: :attr:`LiveRun.state` says which.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from slimtune.errors import UserError
from slimtune.run.facts import damage_told
from slimtune.run.folder import RunFolder, records
from slimtune.run.history import History
from slimtune.run.lock import is_asked, is_locked
from slimtune.run.samples import MOST_REPLIES, Sampled, read_samples

__all__ = ["HEARS", "LiveRun", "State"]

State = Literal[
    "absent", "gone", "damaged", "preparing", "running", "stopping", "finishing", "ended", "worse", "guard", "stopped"
]

HEARS: tuple[State, ...] = ("preparing", "running", "stopping")
"""States in which a request to stop is heard, if not at once."""
_KEPT = ("step", "steps", "loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes", "seconds_left",
         "logged_steps", "eval_loss")  # fmt: skip
"""What is kept of a step's record: there may be a hundred thousand."""
_TAIL = 512
"""Bytes: a line of the metrics, and a bit."""


class _Grown:
    """What a file of lines has grown by since the last look.

    It may have been replaced by another one, or cut (a line that a killed process left unfinished): where it isn't what
    was read any more, it is read from its beginning.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._read = 0
        self._tail = b""
        """The last bytes that were read: of another file they are others."""
        self._rest = b""

    def lines(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether it begins anew, and the new whole lines.

        Raises:
            OSError: It can't be read.
            ValueError: It is no file but a pipe or a device, which may have no end.
        """
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            anew = self._read > 0
            self._read, self._tail, self._rest = 0, b"", b""
            return anew, []
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("no regular file")
            file.seek(self._read - len(self._tail))
            anew = file.read(len(self._tail)) != self._tail
            if anew:
                self._read, self._tail, self._rest = 0, b"", b""
                file.seek(0)
            new = file.read()
        self._read += len(new)
        self._tail = (self._tail + new)[-_TAIL:]
        *whole, self._rest = (self._rest + new).split(b"\n")
        return anew, records(b"\n".join(whole).decode("utf-8", errors="replace"))


class LiveRun:
    """One run, watched.

    Args:
        path: Its folder; it needn't be there yet.
        name: What it is called.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.history = History()
        self.facts: Mapping[str, Any] = {}
        self.sampled: Sampled = read_samples([])
        self.state: State = "absent"
        self.problem = ""
        """What in its files no run has written, where something is."""
        self.written: float = 0.0
        """When the last line of the metrics was written, in seconds since 1970."""
        self._run = RunFolder(path)
        self._metrics, self._samples = _Grown(self._run.metrics_file), _Grown(self._run.samples_file)
        self._sampled: list[dict[str, Any]] = []
        self._facts_at = -1
        self._seen = False

    def look(self) -> bool:
        """Read what is new, and say whether anything is. What can't be read at the moment is as it was."""
        before, changed = self.state, False
        try:
            with damage_told(self._run.metrics_file):
                changed = self._look()
        except OSError:
            if not self.path.is_dir():
                self.state = "gone"
        except UserError as error:
            self.state, self.problem = "damaged", error.what
        return changed or self.state != before

    def _look(self) -> bool:
        if not self.path.is_dir():
            self.state = "gone" if self._seen else "absent"
            return False
        self._seen, changed = True, False
        anew, lines = self._metrics.lines()
        if anew:
            self.history, self.problem = History(), ""
        for line in lines:
            self.history.take(line if "event" in line else {key: line[key] for key in _KEPT if key in line})
        if lines:
            self.written = self._run.metrics_file.stat().st_mtime
        changed |= anew or bool(lines)
        anew, lines = self._samples.lines()
        if anew:
            self._sampled = []
        if lines or anew:
            self._sampled += lines
            self.sampled, changed = read_samples(self._sampled, MOST_REPLIES), True
        at = self._run.facts_file.stat().st_mtime_ns if self._run.facts_file.is_file() else 0
        if at != self._facts_at:
            self._facts_at, changed = at, True
            with suppress(UserError):  # they are told by the verbs that are about them
                self.facts = self._run.facts()
        self.state = "damaged" if self.problem else self._state()
        return changed

    def _state(self) -> State:
        done = bool(self.facts.get("training") and self.facts.get("verified"))
        if not is_locked(self.path):
            if done:
                return "worse" if (self.facts.get("verdict") or {}).get("outcome") == "worse" else "ended"
            last = self.history.last
            return "guard" if last is not None and last.get("event") == "guard" else "stopped"
        if is_asked(self.path):
            return "stopping"
        if done or self._all_steps_done():
            return "finishing"
        return "running" if self.history.last is not None else "preparing"

    def _all_steps_done(self) -> bool:
        steps = self.history.steps
        return bool(steps) and steps[-1]["step"] >= steps[-1].get("steps", float("inf"))

    @property
    def is_working(self) -> bool:
        """Whether a process works on it."""
        return self.state in ("preparing", "running", "stopping", "finishing")

    @property
    def last(self) -> Mapping[str, Any]:
        """The last step's record; empty before the first one."""
        return self.history.steps[-1] if self.history.steps else {}

    @property
    def end(self) -> datetime | None:
        """When its last step will be done, by its last step; None if that can't be said."""
        left = self.last.get("seconds_left")
        if self.state != "running" or not isinstance(left, int | float) or not 0 <= left < 1e9:
            return None
        return datetime.fromtimestamp(self.written) + timedelta(seconds=left)
