"""Which of several processes this one is, by the environment that launchers set. Nothing here loads torch.

``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` are what torchrun
sets (docs.pytorch.org/docs/stable/elastic/run.html), and what other launchers can.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimtune.errors import UserError

__all__ = ["Place", "cards_here", "take_card", "this_place", "unheard_of"]

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they have started; accelerate waits for all of them (1.14, ``state.py``)."""
_TOLD = (*_NEEDED, *_SIZES, "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """One process among those that train one adapter."""

    rank: int = 0
    """0 writes the run's folder."""
    count: int = 1
    local: int = 0
    """Its number on its host."""
    local_count: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1


def this_place(environment: MutableMapping[str, str] = os.environ) -> Place:
    """The place that the environment gives this process.

    Raises:
        UserError: It was started as one of several, and isn't told which.
    """
    told = {name: environment[name] for name in _TOLD if environment.get(name, "")}
    sizes = {name: told[name] for name in _SIZES if told.get(name, "1") != "1"}
    if told.get("LOCAL_RANK") == "-1" or told.get("WORLD_SIZE") == "1":
        told.pop("LOCAL_RANK", None)
    if not sizes and "LOCAL_RANK" not in told:
        return Place()
    missing = [name for name in _NEEDED if name not in told]
    numbers = {name: told.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    is_number = all(value.isdecimal() for value in numbers.values() if value)
    if missing or not is_number:
        said = ", ".join(f"{name}={value}" for name, value in {**sizes, **told}.items())
        raise UserError(
            f"this process was started as one of several ({said}), without {', '.join(missing)}"
            if missing
            else f"this process was started as one of several ({said}), and isn't told which",
            rule="Ranks find each other by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets "
            "them.",
            way_out="slimtune train --gpus 2 …, or torchrun --nproc-per-node 2 --no-python slimtune train …",
        )
    rank, count = int(told["RANK"]), int(told["WORLD_SIZE"])
    local = int(told.get("LOCAL_RANK", rank))
    if rank >= count:
        raise UserError(f"RANK={rank} isn't one of WORLD_SIZE={count}", rule="Ranks count from 0.")
    return Place(rank, count, local, int(told.get("LOCAL_WORLD_SIZE", local + 1)))


def cards_here(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> list[str]:
    """The names by which CUDA can be told of each GPU that this process may use; asks no driver.

    In a container ``/dev`` has those that it was given. Empty where nothing is known.
    """
    if VISIBLE in environment:
        return [name.strip() for name in environment[VISIBLE].split(",") if name.strip()]
    return [str(number) for number in range(len(list((root / "dev").glob("nvidia[0-9]*"))))]


def take_card(place: Place, environment: MutableMapping[str, str] = os.environ) -> int:
    """Let this process see one GPU, its own, before CUDA starts; gives how many it leaves to others.

    A process that sees one already has been given it by its launcher.

    Raises:
        UserError: There are more processes on this host than GPUs.
    """
    cards = cards_here(environment)
    if not cards:  # none, or of another kind; whether all have the same is looked at later
        if not place.alone:
            environment.setdefault(VISIBLE, str(place.local))
        return 0
    if len(cards) == 1 and VISIBLE in environment:
        return 0
    if place.local >= len(cards):
        raise UserError(
            f"rank {place.rank} has no GPU: {place.local_count} processes were started on a host with {len(cards)}",
            rule="One process takes one GPU.",
            way_out="Start as many processes as there are GPUs.",
        )
    environment[VISIBLE] = cards[place.local]
    return len(cards) - max(1, place.local_count)


@contextmanager
def unheard_of(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """While the body runs, no library is told of the other ranks: accelerate would wrap and share by itself."""
    hidden = {name: environment.pop(name) for name in _TOLD if name in environment}
    try:
        yield
    finally:
        environment.update(hidden)
