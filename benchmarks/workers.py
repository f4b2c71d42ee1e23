"""Many short trainings at once, a process each, over the GPUs there are: for defaults.py and rehearse.py beside it."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["measure", "options_of", "results_of"]

Job = dict[str, Any]


def _worker(number: int, work: Any, done: Any, do: Callable[[Job], Job], until: float) -> None:
    from slimtune.ranks.place import VISIBLE, cards_here

    if cards := cards_here():
        os.environ[VISIBLE] = cards[number % len(cards)]
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


_GRACE = 5.0
"""Seconds beyond their time after which workers are ended in the middle of what they do."""


def results_of(
    jobs: Iterable[Job],
    do: Callable[[Job], Job],
    *,
    workers: int,
    seconds: float,
    keep: Callable[[list[Job]], None] = lambda results: None,
) -> list[Job]:
    """What ``do`` makes of each job, in the order of the jobs' ends; each is printed as a line of JSON.

    Args:
        jobs: In the order in which they begin.
        do: A function of a module's own; it gets its process's imports.
        workers: Processes.
        seconds: No job begins that would end later, by the longest so far; what isn't done then is ended.
        keep: Called with all results after each of them, so that nothing is lost if this process is ended.
    """
    until = time.time() + seconds
    context = multiprocessing.get_context("spawn")
    work, done = context.Queue(), context.Queue()
    for job in [*jobs, *[None] * workers]:
        work.put(job)
    processes = [
        context.Process(target=_worker, args=(number, work, done, do, until), daemon=True) for number in range(workers)
    ]
    for process in processes:
        process.start()
    results, busy = [], workers
    while busy:
        try:
            result = done.get(timeout=max(0.1, until + _GRACE - time.time()))
        except queue.Empty:
            break
        if result is None:
            busy -= 1
            continue
        results.append(result)
        print(json.dumps(result), flush=True)
        keep(results)
    for process in processes:
        process.kill()  # a training would save first when it is asked to end
    return results


def options_of(description: str | None) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=1e6, help="no training begins that would end later")
    parser.add_argument("--workers", type=int, default=12, help="trainings at once")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="write everything into this file")
    return parser


def measure(
    options: argparse.Namespace,
    jobs: Sequence[Job],
    trained: Callable[..., Job],
    summary: Callable[[list[Job]], Iterable[Job]],
    **more: Any,
) -> None:
    """Do the jobs, print what they come to, and write both where ``options`` say. ``more`` goes to ``trained``."""
    from slimtune.base.named import model_source

    model_source(options.model)  # the embedded one is converted once, not by each worker
    do = functools.partial(trained, base=options.model, tiny=options.tiny, **more)
    header: Job = {}
    if options.out is not None:
        from peers import machine

        header = machine()

    def keep(results: list[Job]) -> None:
        if options.out is not None:
            made = {**header, "summary": list(summary(results)), "results": results}
            options.out.write_text(json.dumps(made, indent=1) + "\n")

    results = results_of(jobs, do, workers=options.workers, seconds=options.seconds, keep=keep)
    for line in summary(results):
        print(json.dumps(line), flush=True)
    print(f"{len(results)} of {len(jobs)} trainings", flush=True)
