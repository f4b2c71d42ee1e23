"""``slimtune runs [FOLDER]``: a table of runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from slimtune.cli.formatting import say
from slimtune.cli.page import Page
from slimtune.errors import shown
from slimtune.run.listing import SORTS, RunLine, list_runs
from slimtune.run.screen import size_text
from slimtune.run.statement import counted
from slimtune.words import told

__all__ = ["command"]

_NARROWEST_TABLE = 110
_WIDTH_OF_FILES = 1_000
_STYLES = {"worse": "red", "damaged": "red", "unfinished": "yellow"}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--sort", type=click.Choice(list(SORTS)), default="when", show_default=True, help="The newest or the best first."
)
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
def command(folder: Path | None, sort: str, as_json: bool) -> None:
    """List the runs in FOLDER and below it: model, data, steps, held-out loss before and after, size, when.

    FOLDER is runs, where slimtune train puts them, or else the current folder.
    """
    place = folder or (Path("runs") if Path("runs").is_dir() else Path())
    lines = list_runs(place, sort)
    if as_json:
        click.echo(json.dumps([asdict(line) for line in lines], ensure_ascii=False, indent=2))
        return
    if not lines:
        say(f"no runs in {place.resolve()}", err=True)
        return
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    page = Page()
    if not page.is_terminal:
        page.width = _WIDTH_OF_FILES  # a line a run, to be searched
    if page.width < _NARROWEST_TABLE:
        for line in lines:
            page.print(Text(shown(line.path), f"bold {_STYLES.get(line.state, '')}"))
            model, data, steps, *rest = _cells(line)
            cells = [model, data, steps and told(counted(int(line.steps or 0), "step")), *rest]
            page.print(Padding(Text(" · ".join(cell for cell in cells if cell)), (0, 0, 0, 2)))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run", "model", "data"):
        table.add_column(told(name), overflow="fold")
    for name in ("steps", "held-out loss", "adapter"):
        table.add_column(told(name), justify="right", no_wrap=True)
    table.add_column(told("began"), no_wrap=True)
    for line in lines:
        table.add_row(Text(shown(line.path), _STYLES.get(line.state, "")), *map(Text, _cells(line)))
    page.print(table)


def _cells(line: RunLine) -> tuple[str, ...]:
    losses = " → ".join(f"{loss:.3f}" for loss in (line.held_out_before, line.held_out_after) if loss is not None)
    return (
        Path(shown(line.model or "")).name,
        shown(", ".join(Path(name).name or name for name in line.data)),
        "" if line.steps is None else f"{line.steps:,}",
        losses if line.state == "done" else f"{losses} {told(line.state)}".strip(),
        "" if line.adapter_bytes is None else size_text(line.adapter_bytes),
        "" if line.created is None else line.created[:10],
    )
