"""``slimtune resume RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimtune.cli.closing import close
from slimtune.cli.formatting import say
from slimtune.cli.gpus import option as gpus_option
from slimtune.cli.gpus import spread
from slimtune.cli.hub import look_for_hub
from slimtune.cli.imports import fast_imports
from slimtune.cli.notify import check_targets, notifying
from slimtune.cli.notify import option as notify_option
from slimtune.cli.options import config_from_flags, config_options, grouped_command
from slimtune.cli.watch import beside, check_page
from slimtune.config import FREE_KEYS, Config
from slimtune.ranks.meeting import excused
from slimtune.ranks.place import take_card, this_place
from slimtune.run.folder import RunFolder
from slimtune.training.allocator import growing_segments
from slimtune.training.determinism import fix_workspace
from slimtune.training.stop import StopSignals

__all__ = ["command"]


@click.command(
    cls=grouped_command(
        "May change", *(name for name in Config.model_fields if name in FREE_KEYS - {"output"}), "accept_changes"
    )
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--accept-changes", is_flag=True, help="Go on although something changed since the checkpoint; recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's facts as JSON at the end, and nothing else.")
@gpus_option
@notify_option
@click.option("--watch", is_flag=True, help="Show the run on a live page meanwhile; its address is printed.")
@config_options
def command(
    run: Path,
    accept_changes: bool,
    as_json: bool,
    gpus: str | None,
    notify: tuple[str, ...],
    watch: bool,
    config_file: Path | None,
    **flags: Any,
) -> None:
    """Go on with RUN, a run that was stopped, from its newest whole checkpoint.

    The result is the adapter of a run that was never stopped, bit by bit on a CPU. So config, data, base, template,
    tokenizer and library versions must be what they were; flags that change no step's numbers may be given
    (--save-steps, --logging-steps, --watchdog, --on-nonfinite and the like). Without a checkpoint it begins at the
    first step.
    """
    place = this_place()
    config: Config | None = None
    with excused(place):
        check_targets(notify)
        if watch:
            check_page()
        if place.rank == 0:  # whose disk the run is on
            folder = RunFolder.open(run)
            config = config_from_flags(config_file or folder.config_file, flags)
            if place.alone and folder.is_finished(config):
                say(f"{run} is finished: nothing was changed", err=True)
                close(folder, as_json=as_json)
                return
        elif RunFolder(run).config_file.is_file():
            config = config_from_flags(config_file or RunFolder(run).config_file, flags)
        if config is not None:
            look_for_hub(config.model)
            if place.rank == 0:
                spread(gpus, place, config)
            fix_workspace(config)
        growing_segments()
        take_card(place)

    with notifying(notify if place.rank == 0 else (), lambda: run), StopSignals(run):
        # Here, as it loads torch, and --help is to answer at once.
        with fast_imports():
            from slimtune.recipes import resume
            from slimtune.run.screen import Screen

        with beside(run if watch and place.rank == 0 else None):
            folder = resume(
                run,
                config,
                accept_changes=accept_changes,
                trust_remote_code=bool(flags["trust_remote_code"]),
                screen=Screen(quiet=as_json),
            )
    if place.rank == 0:
        close(folder, as_json=as_json)
