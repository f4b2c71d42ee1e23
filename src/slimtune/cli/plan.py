"""``slimtune plan MODEL [DATA]``: what a run would take, before a weight is downloaded."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len

from slimtune.cli.early import check_files
from slimtune.cli.hub import check_model
from slimtune.cli.imports import fast_imports
from slimtune.cli.options import config_from_flags, config_options, grouped_command
from slimtune.config import Config
from slimtune.width import folded
from slimtune.words import told

if TYPE_CHECKING:
    from slimtune.training.forecast import Forecast, Forecaster

__all__ = ["command"]

SIZES = {8: "RTX 4060", 12: "RTX 4070", 16: "RTX 5080", 24: "RTX 4090", 48: "L40S", 80: "H100"}
"""GiB of the cards in the table, and whose speed a size stands for."""
_SPARED = (7, 5, 6, 4, 10, 3, 8)
"""Columns that a narrow terminal doesn't get, the least needed first: the parts, RAM for the longest document, what
nvidia-smi shows, RAM."""
_GAP = "  "
_LABEL = 10
"""Characters of a label with the room behind it."""
NEEDED_MOST = ("gpu", "gpus", "memory", "max_length", "micro_batch", "lora_r", "targets", "quantization", "as_json")


@click.command(cls=grouped_command("Needed most", *NEEDED_MOST))
@click.argument("model", required=False)
@click.argument("data", nargs=-1)
@click.option("--gpu", metavar="NAME", help="Plan for this card, as RTX 4090 or H100.")
@click.option(
    "--gpus", type=click.IntRange(1), default=1, metavar="N", help="So many of them share a step, eight to a host."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
@config_options
def command(
    model: str | None,
    data: tuple[str, ...],
    gpu: str | None,
    gpus: int,
    as_json: bool,
    config_file: Path | None,
    **flags: Any,
) -> None:
    """Say whether MODEL trains on a card and what it takes there; only its config and its files' headers are read.

    With DATA also what a run on it would do, as `slimtune train --dry-run` says it.
    """
    config = config_from_flags(config_file, {"model": model, "data": data, **flags})
    check_model(config.model)
    check_files(*config.data)
    with fast_imports():
        from slimtune.cli.bar import busy
        from slimtune.cli.dry_run import dry_run
        from slimtune.hardware import card_named, detect
        from slimtune.plan import check_precision
        from slimtune.run.quiet import upstream_to_log
        from slimtune.run.screen import Screen
        from slimtune.training.forecast import Forecaster

    card = None if gpu is None else card_named(gpu)
    if card is not None or detect().device == "cuda":
        check_precision(config, card or detect())
    # What another card multiplies in needn't be had here.
    here = config if card is None else config.model_copy(update={"precision": "auto"})
    with upstream_to_log(None):
        rehearsed = dry_run(here, Screen(quiet=as_json)) if config.data else {}
        with busy("planning"):
            forecaster = Forecaster(config, _lengths(config, rehearsed), gpus)
            rows = _rows(forecaster, config, card)
    if as_json:
        click.echo(json.dumps(_facts(forecaster, rows, rehearsed) | rehearsed, ensure_ascii=False, indent=2))
    else:
        click.echo("\n".join(_lines(forecaster, config, rows, rehearsed)))


def _lengths(config: Config, rehearsed: dict[str, Any]) -> list[int] | None:
    """As many of the data's documents as a micro-batch holds; without data, nothing is known of them."""
    mean = rehearsed.get("mean_length")
    return None if mean is None else [mean] * max(1, config.batch_tokens // mean)


def _run_seconds(forecaster: Forecaster, row: Forecast, rehearsed: dict[str, Any]) -> float:
    """Of the whole run, evaluations and saves not counted; 0 where the card's speed or the data isn't known."""
    tokens: int = rehearsed.get("tokens", 0)
    return row.step_seconds * tokens / forecaster.step_tokens


def _rows(forecaster: Forecaster, config: Config, card: Any) -> list[Forecast]:
    """What was asked for first, then a card of each size."""
    from slimtune.engine.ram import ram_to_lock
    from slimtune.hardware import CARDS, Card, detect
    from slimtune.plan import memory_budget

    if forecaster.unfused is not None:
        return []
    machine, budget, asked = detect(), memory_budget(config), []
    ram = ram_to_lock() if card is None and machine.device == "cuda" else None  # as a run here plans
    card = card if ram is None else machine.card
    if budget is not None:
        named = Card(config.memory, budget, (8, 0))
        card = named if card is None else replace(card, name=f"{named.name} of {card.name}", memory_bytes=budget)
    if card is not None:
        told = forecaster.with_longest(card, budget, ram)
        # What it takes with more RAM, where here is too little.
        asked = [told if told.trains or ram is None else forecaster.with_longest(card, budget)]
    sizes = [replace(CARDS[like], name=f"{size}GiB ({like})", memory_bytes=size << 30) for size, like in SIZES.items()]
    return asked + [forecaster.with_longest(each) for each in sizes]


def _facts(forecaster: Forecaster, rows: list[Forecast], rehearsed: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": forecaster.config.model,
        "download_bytes": forecaster.base.file_bytes,
        "weights_bytes": forecaster.weights,
        "targets": list(forecaster.targets),
        "trainable_parameters": forecaster.adapter_parameters,
        "engine": "fused" if forecaster.unfused is None else f"plain: {forecaster.unfused}",
        "cards": [
            asdict(row) | {"bytes": row.nbytes, "run_seconds": _run_seconds(forecaster, row, rehearsed)} for row in rows
        ],
    }


def _lines(forecaster: Forecaster, config: Config, rows: list[Forecast], rehearsed: dict[str, Any]) -> list[str]:
    from slimtune.training.forecast import gib
    from slimtune.training.pace import HOST_CARDS, HOST_LINK, MEASURED

    parameters = told(f"{forecaster.parameters / 1e6:,.1f} M parameters")
    loads = told(f"{gib(forecaster.base.file_bytes)} to download, {gib(forecaster.weights)} as loaded")
    trained = told(f"{forecaster.adapter_parameters:,} parameters train")
    lines = [
        _line(told("model"), f"{config.model} · {parameters} · {loads}"),
        _line(told("adapter"), f"r={config.lora_r} · {', '.join(forecaster.targets)} · {trained}"),
    ]
    if forecaster.unfused is not None:
        unplanned = told("the plain stack's activations come on top of the weights, and nothing plans them")
        plain = told(f"plain: {forecaster.unfused}")
        return [*lines, _line(told("engine"), plain), _line(told("memory"), unplanned)]
    batch = f"{config.micro_batch} x {config.max_length:,}"
    room = told(f"{batch} tokens, or as many of its documents at once as there is room for")
    said = [
        told("A card's tenth is left to CUDA and to what can't be allocated in one piece."),
        told("Shown: what nvidia-smi then shows, with both, about; by steps of one H200."),
        told("Longest: tokens of one document."),
        told(f"A step and this data: by rates fitted to steps of one {MEASURED}."),
        told("Other cards: by the rates that their makers publish, which is arithmetic."),
        told("Saves and evaluations come on top."),
    ]
    if any(row.launched for row in rows):
        said.append(told("~: as long as a host takes to launch the work, and hosts differ by half and more."))
    if forecaster.cards > 1:
        most = max((row.sum_seconds for row in rows), default=0.0)
        said += [
            told(f"{forecaster.config.accumulation} micro-batches of a step are shared by {forecaster.cards} GPUs."),
            told(f"In RAM: of a host with {forecaster.sharing} of them, for which weights are there once."),
            told(
                f"To add up their gradients takes {most * 1e3:.2g} ms at most of these, in rings of {HOST_CARDS} in a "
                f"host, between hosts at {8 * HOST_LINK:g} Gb/s: arithmetic too."
            ),
        ]
    if forecaster.fp8_told:
        lines.append(_line(told("engine"), told(forecaster.fp8_told)))
    return [
        *lines,
        _line(told("batch"), room),
        "",
        *_table(forecaster, rows, rehearsed),
        "",
        *(_broken("", text) for text in said),
    ]


def _line(label: str, text: str) -> str:
    return _broken(f"{label}{' ' * (_LABEL - cell_len(label))}", text)


def _broken(head: str, text: str) -> str:
    """A text behind its head: in a terminal broken between words, clear of the head."""
    room = _room()
    lines = [text] if room is None else folded(text, room - cell_len(head))
    return f"\n{'':{cell_len(head)}}".join([head + lines[0], *lines[1:]])


def _room() -> int | None:
    """Columns of the terminal; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _table(forecaster: Forecaster, rows: list[Forecast], rehearsed: dict[str, Any]) -> list[str]:
    """The cards' lines under their heads, each column as wide as its widest cell on the screen. A terminal that is
    too narrow gets fewer columns."""
    heads = (
        told("card"), told("trains"), told("takes"), told("shown"), told("weights"), told("adapter"),
        told("activations"), told("workspace"), told("in RAM"), told("longest"), told("in RAM"), told("a step"),
        told("this data"),
    )  # fmt: skip
    table = [heads, *(_cells(forecaster, row, rehearsed) for row in rows)]
    if not rehearsed:
        table = [line[:-1] for line in table]
    widths = {column: max(cell_len(line[column]) for line in table) for column in range(len(table[0]))}
    room = _room()
    for column in _SPARED:
        if room is not None and sum(widths.values()) + len(_GAP) * (len(widths) - 1) > room:
            del widths[column]
    more = [told("A wider terminal shows more columns.")] if len(widths) < len(table[0]) else []
    return more + [
        _GAP.join(line[column] + " " * (width - cell_len(line[column])) for column, width in widths.items()).rstrip()
        for line in table
    ]


def _cells(forecaster: Forecaster, row: Forecast, rehearsed: dict[str, Any]) -> tuple[str, ...]:
    from slimtune.run.screen import time_left
    from slimtune.training.forecast import gib

    parts = (gib(row.parts[part]) for part in ("weights", "adapter", "activations", "workspace"))
    longest = f"{row.longest:,}" if row.longest else "-"
    ram, longest_ram = (gib(nbytes) if nbytes else "-" for nbytes in (row.locked_bytes, row.longest_ram))
    seconds = row.step_seconds if row.trains else 0.0
    whole = _run_seconds(forecaster, row, rehearsed) if row.trains else 0.0
    about = "~" if row.launched else ""
    times = (f"{about}{seconds:.2g} s" if seconds else "-", time_left(whole) if whole else "-")
    return (
        row.card,
        told("yes") if row.trains else told("no"),
        gib(row.nbytes),
        gib(row.shown_bytes),
        *parts,
        ram,
        longest,
        longest_ram,
        *times,
    )
