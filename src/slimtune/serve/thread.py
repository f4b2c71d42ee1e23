"""One thread that computes: the one that loaded the models.

Torch's CPU builds divide their work among threads by libgomp. Every thread that asks for that gets workers of its own,
which stay, and once all of these are more than the machine has cores, libgomp lets them sleep at the end of each piece
of work instead of waiting awake for the next (its manual: ``GOMP_SPINCOUNT``). A step of sixteen requests is thousands
of small pieces, and waking the workers for each of them took as long as the work. So loading, and every step of every
model's engine, are done in one thread, and there is one set of workers.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

__all__ = ["CallingThread"]

T = TypeVar("T")


class CallingThread(Executor):
    """An executor whose work is done in the thread that calls :meth:`run`."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have ``work`` done after what was submitted before it."""
        future: Future[T] = Future()
        self._work.put((future, partial(work, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let :meth:`run` return after what was submitted so far. It is never waited for, and nothing is cancelled."""
        self._work.put(None)

    def run(self) -> None:
        """Do what is submitted until :meth:`shutdown`."""
        while (submitted := self._work.get()) is not None:
            future, work = submitted
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
                future.set_exception(error)
