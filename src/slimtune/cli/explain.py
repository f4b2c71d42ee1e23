"""``slimtune explain RUN``: what a run did, from what was measured."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import click

from slimtune.cli.page import Page
from slimtune.errors import UserError
from slimtune.language import language
from slimtune.run.explain import explain
from slimtune.run.facts import damage_told
from slimtune.run.folder import RunFolder
from slimtune.run.history import read_history
from slimtune.run.show import write_terminal

__all__ = ["command"]

NARROWEST, WIDEST = 60, 110


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print the facts and every statement with its verdict as JSON.")
@click.pass_context
def command(ctx: click.Context, run: Path, as_json: bool) -> None:
    """Tell what RUN did, from what it measured: the base in 4 bits, the adapter, the wrapping, the training.

    A statement that was checked is marked: proved, broken, or not measured. Ends with exit code 1 if one is broken.
    """
    folder = RunFolder.open(run)
    facts = folder.facts()
    if not facts:
        raise UserError(
            f"run {run} has no facts.json",
            rule="A run measures itself and writes its facts at its end.",
            way_out=f"Go on with it: slimtune resume {shlex.quote(str(run))}",
        )
    with damage_told(folder.metrics_file):
        on_the_way = read_history(folder.metrics()).on_the_way
    with damage_told(folder.facts_file):
        explanation = explain(facts | on_the_way, language())
    if as_json:
        counts = {status: explanation.count(status) for status in ("proved", "broken", "unmeasured")}
        value = {"facts": facts, "counts": counts, **asdict(explanation)}
        click.echo(json.dumps(value, ensure_ascii=False, indent=2))
    else:
        console = Page()
        console.width = max(NARROWEST, min(WIDEST, console.width))
        write_terminal(explanation, console)
    if explanation.count("broken"):
        ctx.exit(1)
