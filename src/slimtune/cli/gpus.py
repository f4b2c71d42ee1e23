"""``--gpus``: a verb that trains, as several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from slimtune.config import Config
from slimtune.ranks.launch import count_of, launch, without_gpus
from slimtune.ranks.place import Place

__all__ = ["option", "spread"]

option: Callable[[Any], Any] = click.option(
    "--gpus", metavar="N", help="GPUs of this host that train together, or all; a step's micro-batches are shared.  [1]"
)


def spread(gpus: str | None, place: Place, config: Config) -> None:
    """Where ``--gpus`` asks for several, run this command as so many processes, and end as they do.

    Raises:
        UserError: There aren't so many GPUs, or they can't share a step as ``config`` says.
    """
    count = count_of(gpus, place)
    if count > 1:
        from slimtune.ranks.share import check_even  # here, as it loads numpy, and most commands need no launcher

        if config.gradient_accumulation != "auto":
            check_even(config.gradient_accumulation, count)
        raise click.exceptions.Exit(launch(count, without_gpus(sys.argv[1:])))
