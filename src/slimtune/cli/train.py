"""``slimtune train MODEL DATA -o RUN``."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from slimtune.cli.closing import close
from slimtune.cli.early import check_training
from slimtune.cli.gpus import option as gpus_option
from slimtune.cli.gpus import spread
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.cli.notify import check_targets, notifying
from slimtune.cli.notify import option as notify_option
from slimtune.cli.options import config_from_flags, config_options, grouped_command
from slimtune.cli.watch import beside, check_page
from slimtune.errors import UserError
from slimtune.ranks.meeting import excused
from slimtune.ranks.place import take_card, this_place
from slimtune.training.allocator import growing_segments
from slimtune.training.determinism import fix_workspace
from slimtune.training.stop import StopSignals

__all__ = ["command"]

NEEDED_MOST = (
    "output", "epochs", "learning_rate", "lora_r", "targets", "max_length", "micro_batch", "eval", "gpus",
    "config_file",
)  # fmt: skip


@click.command(cls=grouped_command("Needed most", *NEEDED_MOST))
@click.argument("model", required=False, type=PATH_OR_NAME)
@click.argument("data", nargs=-1, type=PATH_OR_NAME)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The run's folder  [runs/<time>-<model>]")
@click.option("--from", "start_from", type=click.Path(path_type=Path), help="Start from the adapter of this run.")
@click.option("--dry-run", is_flag=True, help="Prove the data and say what would be done; load no weights.")
@click.option("--probe", is_flag=True, help="With --dry-run: load the weights, measure three steps, say the minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's facts as JSON at the end, and nothing else.")
@gpus_option
@notify_option
@click.option("--watch", is_flag=True, help="Show the run on a live page meanwhile; its address is printed.")
@config_options
def command(
    model: str | None,
    data: tuple[str, ...],
    dry_run: bool,
    probe: bool,
    as_json: bool,
    gpus: str | None,
    notify: tuple[str, ...],
    watch: bool,
    config_file: Path | None,
    **flags: Any,
) -> None:
    """Fine-tune MODEL on DATA and save the adapter in a run folder.

    MODEL is a hub id, a local folder, or smollm2-135m (it comes with a package). DATA is one or more files
    (json, jsonl, csv, tsv, txt, parquet, arrow), folders, patterns, hub ids, or - for standard input.
    """
    if probe and not dry_run:
        raise UserError("--probe goes with --dry-run", way_out="Add --dry-run, or leave --probe out.")
    place = this_place()
    with excused(place):
        config = config_from_flags(config_file, {"model": model, "data": data, **flags})
        check_targets(notify)
        if watch:
            check_page()
        check_training(config if place.rank == 0 else config.model_copy(update={"output": None}))
        if not dry_run:
            spread(gpus, place, config)
        fix_workspace(config)
        growing_segments()
        others = take_card(place)

    with notifying(notify if place.rank == 0 and not dry_run else (), lambda: config.output), StopSignals():
        # Here, as it loads torch, and --help is to answer at once.
        with fast_imports():
            from slimtune.cli.dry_run import dry_run as rehearse
            from slimtune.plan import default_output
            from slimtune.recipes import finetune
            from slimtune.run.screen import Screen

        screen = Screen(quiet=as_json)
        if dry_run:
            planned = rehearse(config, screen)
            if probe:
                from slimtune.cli.probe import probe as measure

                planned["seconds"] = measure(config, planned, screen)
            else:
                screen.say("time", "not measured: --probe loads the weights and takes three steps")
            if as_json:
                click.echo(json.dumps(planned, ensure_ascii=False, indent=2))
            return
        if config.output is None and place.rank == 0:
            config = config.model_copy(update={"output": default_output(config.model, datetime.now())})
        if others > 0:
            screen.say("device", f"1 of {others + 1} GPUs; --gpus all takes all of them")
        with beside(config.output if watch and place.rank == 0 else None):
            run = finetune(config, screen=screen)
    if place.rank == 0:
        close(run, as_json=as_json)
