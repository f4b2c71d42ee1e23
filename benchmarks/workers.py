"""Many short trainings at once, each in a process of its own: for benchmarks/defaults.py and benchmarks/rehearse.py."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["results_of"]

Job = dict[str, Any]


def _worker(work: Any, done: Any, do: Callable[[Job], Job], until: float) -> None:
    import torch

    torch.set_num_threads(1)
    slowest = 10.0
    try:
        while (job := work.get()) is not None and time.time() + slowest < until:
            began = time.time()
            done.put({**do(job), "seconds": round(time.time() - began, 1)})
            slowest = max(slowest, 1.2 * (time.time() - began))
    finally:
        done.put(None)


def results_of(jobs: Iterable[Job], do: Callable[[Job], Job], *, workers: int, seconds: float) -> list[Job]:
    """What ``do`` makes of each job, in the order of the jobs' ends; each is printed as a line of JSON.

    Args:
        jobs: In the order in which they begin.
        do: A function of a module's own; it gets its process's imports.
        workers: Processes.
        seconds: No job begins that would end later, by the longest so far.
    """
    until = time.time() + seconds
    context = multiprocessing.get_context("spawn")
    work, done = context.Queue(), context.Queue()
    for job in [*jobs, *[None] * workers]:
        work.put(job)
    processes = [context.Process(target=_worker, args=(work, done, do, until), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    results, busy = [], workers
    while busy:
        result = done.get()
        if result is None:
            busy -= 1
            continue
        results.append(result)
        print(json.dumps(result), flush=True)
    return results
