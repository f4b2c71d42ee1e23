"""Faults that a campaign puts into a run's process before its command starts (``Process(before="…:name")``)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from slimtune.data.packing import PackedBatches
from slimtune.run import durable
from slimtune.training.resumable import ResumableTrainer


def hang(where: str, how: str, at: int) -> None:
    """From the ``at``-th micro-batch, step or save on, hang in that place.

    Args:
        where: data, step or save.
        how: sleep, lock, pipe or child: what the code is stuck in.
        at: Counted from 1.
    """
    seen = {"count": 0}

    def stuck_here() -> None:
        seen["count"] += 1
        if seen["count"] < at:
            return
        if how == "sleep":
            time.sleep(3600)
        elif how == "lock":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        elif how == "pipe":
            os.read(os.pipe()[0], 1)
        else:
            subprocess.run(["sleep", "3600"], check=True)

    def before(target: Any, name: str) -> None:
        original = getattr(target, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            stuck_here()
            return original(*args, **kwargs)

        setattr(target, name, wrapped)

    places = {"data": (PackedBatches, "batch"), "step": (ResumableTrainer, "_run_pieces"), "save": (durable, "_seal")}
    before(*places[where])


class Operations:
    """Stands for :mod:`os` in the durable module: does something after, or instead of, its n-th file operation."""

    NAMES = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")

    def __init__(self, at: int, action: Any, instead: bool = False) -> None:
        self.at, self.action, self.instead = at, action, instead
        self.log: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.NAMES:
            return real

        def operation(*args: Any, **kwargs: Any) -> Any:
            path = (
                f"/proc/self/fd/{args[0]}"
                if name in ("write", "fsync", "close")
                else str(args[-1 if name == "rename" else 0])
            )
            self.log.append((name, Path(path).resolve().name if path.startswith("/proc") else Path(path).name))
            now = len(self.log) == self.at
            if now and self.instead:
                self.action()
            result = real(*args, **kwargs)
            if now and not self.instead:
                self.action()
            return result

        return operation
