"""``slimtune compare RUN [DATA]``: base against tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimtune.cli.early import check_files, check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.cli.using import model_options, sampling_options, say_if_slow
from slimtune.errors import UserError, written_out
from slimtune.language import language
from slimtune.words import told

if TYPE_CHECKING:
    from slimtune.use.compare import Comparison
    from slimtune.use.held_out import HeldOut
    from slimtune.use.load import Opened

__all__ = ["command"]

_WORKS = {"tuned": "asking tuned", "base": "asking base", "losses": "losses"}
_SHOWN, _CHARACTERS = 5, 80
"""Of what got worse: rows, and of each text."""


@click.command()
@click.argument("target", metavar="RUN", type=PATH_OR_NAME)
@click.argument("data", required=False, type=PATH_OR_NAME)
@click.option("--checker", metavar="FILE.PY:FUNCTION", help="(reply, reference) to 0…1, instead of exact match.")
@click.option("--general/--no-general", default=True, help="Ask the general set that comes with the package  [on]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of compare.html and .json  [RUN]")
@click.option("--fail-if", "conditions", multiple=True, metavar="CONDITION", help="score<0.9, general_change<-0.05, …")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
@model_options
@sampling_options
def command(
    target: str,
    data: str | None,
    checker: str | None,
    general: bool,
    output: Path | None,
    conditions: tuple[str, ...],
    as_json: bool,
    base: str | None,
    quantization: str | None,
    compute_dtype: str | None,
    trust_remote_code: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Ask RUN and its base the held-out rows of DATA and a general set; show what got better and what got worse.

    Without DATA the rows are those that the run held out of its training.
    --fail-if ends with exit code 3 when its condition holds.
    """
    check_target(target)
    check_files(*[data] if data else [])
    with fast_imports():
        from slimtune.cli.bar import busy, counting
        from slimtune.run.durable import check_writable, replace_file
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.compare import compare, fail_if, load_checker, parse_condition
        from slimtune.use.compare_page import comparison_page
        from slimtune.use.load import open_model
        from slimtune.use.sampling import Sampling

    for condition in conditions:
        parse_condition(condition)
    check = load_checker(checker) if checker else None
    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    folder = output or Path(target)
    check_writable(folder)
    with upstream_to_log(None):
        with busy("loading the model"):
            opened = open_model(
                target, base=base, quantization=quantization, dtype=compute_dtype, trust_remote_code=trust_remote_code
            )
        say_if_slow(opened)
        asked = data or _held_out(opened)
        with counting(_WORKS) as tell:
            made = compare(opened, asked, checker=check, general=general, sampling=sampling, on_progress=tell)
    text = json.dumps(made.as_dict(), ensure_ascii=False, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "compare.html", comparison_page(made, language()))
    replace_file(folder / "compare.json", text + "\n")
    if as_json:
        click.echo(text)
    else:
        _show(made, folder / "compare.html")
    fail_if(made, conditions)


def _show(made: Comparison, page: Path) -> None:
    """The table, and what got worse, at the width that there is."""
    from rich.box import SIMPLE
    from rich.table import Table

    from slimtune.cli.page import Page, Prose

    screen = Page()
    table = Table("", told("base"), told("tuned"), told("change"), box=SIMPLE)
    for row in made.rows():
        table.add_row(*(told(cell) for cell in row))
    screen.print(table)
    worse = made.worse()
    if worse:
        lost = Table(told("got worse"), told("base"), told("tuned"), box=SIMPLE, expand=True)
        for item in worse[:_SHOWN]:
            lost.add_row(*(Prose(_short(text)) for text in (item.asked, item.base_reply, item.reply)))
        screen.print(lost)
    if len(worse) > _SHOWN:
        say(f"and {len(worse) - _SHOWN} more")
    say(f"every reply: {page}")


def _short(text: str) -> str:
    line = " ".join(written_out(text).split())
    return line if len(line) <= _CHARACTERS else line[: _CHARACTERS - 1] + "…"


def _held_out(opened: Opened) -> HeldOut | None:
    """The rows that the run held out; None, and the reason is said, if there are none to be had."""
    from slimtune.use.held_out import held_out_of

    try:
        return held_out_of(opened)
    except UserError as error:
        say(f"no held-out rows: {error.what}", err=True)
        return None
