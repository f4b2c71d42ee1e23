"""``--gpus N``: the same command once more, as N processes on this host, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from types import FrameType

from slimtune.errors import StopRequested, UserError
from slimtune.ranks.place import Place, cards_here
from slimtune.words import told

__all__ = ["count_of", "launch", "without_gpus"]


def count_of(gpus: str | None, place: Place) -> int:
    """How many processes ``--gpus`` asks for; 1 where this process is one of them already.

    Raises:
        UserError: It is no number, or there aren't so many GPUs.
    """
    if gpus is None or not place.alone:
        return 1
    here = len(cards_here())
    if gpus == "all":
        return max(1, here)
    if not gpus.isdecimal() or int(gpus) < 1:
        raise UserError(f"--gpus {gpus}", rule="It is a number, or all.")
    # Without a GPU the processes share the CPU: slow, but so that a run can be tried where there is none.
    if here and int(gpus) > here:
        raise UserError(f"--gpus {gpus}: this host has {here}", way_out="Give --gpus all, or fewer.")
    return int(gpus)


def without_gpus(arguments: Sequence[str]) -> list[str]:
    """A command line without its ``--gpus``."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--gpus":
            next(words, None)
        elif not word.startswith("--gpus="):
            kept.append(word)
    return kept


_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run ``slimtune`` with ``arguments`` as ``count`` ranks; gives the exit code, which is that of who ended first.

    What rank 0 says is on the screen; a rank that fails is named there by its number.

    Raises:
        StopRequested: A signal came before there were ranks, which would say so.
    """
    before = {number: signal.signal(number, _stop) for number in _STOPS}
    try:
        return _launched(count, arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise StopRequested(f"stopped by {signal.Signals(number).name}", way_out="Give the same command again.")


def _launched(count: int, arguments: Sequence[str]) -> int:
    # Here, as it loads torch, and most commands need no launcher.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # As long as a step and a save may take; torch's own 30 s could cut a large one off.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    logging.disable(logging.CRITICAL)  # the launcher's own lines, in a process that does nothing else
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle=",".join(["SIGHUP", "SIGQUIT", *(number.name for number in _STOPS)]),  # once it has begun
    )
    try:
        elastic_launch(config, sys.executable)("-m", "slimtune", *arguments)
    except SignalException:
        return StopRequested.exit_code
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode > 0:
            return int(first.exitcode)
        print(f"slimtune: {told(f'rank {rank} was ended by signal {-first.exitcode}')}", file=sys.stderr)
        # Libraries' threads may abort a process that is about to end: what the others found counts.
        return next(
            (int(each.exitcode) for each in failed.failures.values() if each.exitcode > 0), StopRequested.exit_code
        )
    return 0
