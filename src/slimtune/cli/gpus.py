"""``--gpus``: a verb that trains, as several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from slimtune.ranks.launch import count_of, launch, without_gpus
from slimtune.ranks.place import Place

__all__ = ["option", "spread"]

option: Callable[[Any], Any] = click.option(
    "--gpus", metavar="N", help="GPUs of this host that train together, or all; a step's micro-batches are shared.  [1]"
)


def spread(gpus: str | None, place: Place) -> None:
    """Where ``--gpus`` asks for several, run this command as so many processes, and end as they do.

    Raises:
        UserError: There aren't so many GPUs.
    """
    count = count_of(gpus, place)
    if count > 1:
        raise click.exceptions.Exit(launch(count, without_gpus(sys.argv[1:])))
