"""``slimtune demo``: the main job on the embedded model, with what it learned side by side."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from slimtune.cli.imports import fast_imports
from slimtune.words import told

__all__ = ["command"]


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("slimtune-demo"),
    show_default=True,
    help="The run's folder; an earlier demo's is replaced.",
)
@click.option("--seed", default=42, show_default=True, help="Seed of everything random.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")
def command(output: Path, seed: int, as_json: bool) -> None:
    """Teach a small model to answer in strict JSON: load in 4 bits, ask, train, save the adapter, ask again.

    It runs on this machine's GPU or CPU, without a network.
    """
    # Here, as it loads torch, and --help is to answer at once.
    with fast_imports():
        from rich.table import Table

        from slimtune.cli.page import Page
        from slimtune.recipes import demo
        from slimtune.run.screen import Screen

    result = demo(output, seed=seed, overwrite=True, screen=Screen(quiet=as_json))
    before, after = result.right(result.before), result.right(result.after)
    if as_json:
        scores = {"before": sum(before), "after": sum(after), "of": len(after), "run": str(result.run.path)}
        replies = [
            {"request": row.request, "before": was, "after": now, "right": right}
            for row, was, now, right in zip(result.held_out, result.before, result.after, after, strict=True)
        ]
        click.echo(json.dumps(scores | {"replies": replies}, ensure_ascii=False, indent=2))
        return
    table = Table(title=told("Requests that it was not trained on"), title_justify="left", show_lines=True, expand=True)
    table.add_column(told("request"), ratio=3)
    table.add_column(told(f"before: {sum(before)} of {len(before)} right"), ratio=3)
    table.add_column(told(f"after: {sum(after)} of {len(after)} right"), ratio=4)
    for row, was, now, right in zip(result.held_out, result.before, result.after, after, strict=True):
        table.add_row(row.request, _short(was), f"[{'green' if right else 'red'}]{_escaped(now)}[/]")
    Page().print(table)
    named = shlex.quote(str(output))
    lines = {f"slimtune chat {named}": "talk to it", f"slimtune explain {named}": "what was measured"}
    width = max(map(len, lines))
    click.echo("\n" + "\n".join(f"  {line:<{width}}  {told(what)}" for line, what in lines.items()))


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return _escaped(line if len(line) <= width else line[: width - 1] + "…")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
