"""``slimtune init``: a few questions, and a config that `train` reads."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from slimtune.base.embedded import EMBEDDED
from slimtune.base.named import check_name
from slimtune.cli.config import flow
from slimtune.cli.early import check_files
from slimtune.cli.fits import Fit, fit_here
from slimtune.cli.hub import cached_models, look_for_hub
from slimtune.config import Config
from slimtune.errors import SlimtuneError, UserError
from slimtune.run.durable import check_writable, replace_file
from slimtune.width import folded
from slimtune.words import told

__all__ = ["GOALS", "command"]

_WIDTH = 76
_MOST_MODELS = 6
"""Of those on this machine that are listed."""


@dataclass(frozen=True)
class Goal:
    """What a run is for, and the keys that follow from it."""

    title: str
    keys: dict[str, Any] = field(default_factory=dict)


GOALS = {
    "task": Goal("a task or a tone, as my rows show it"),
    "keep": Goal("the same, and it keeps what it can besides", {"rehearse": 0.1}),
    "ollama": Goal("the same, and a file for Ollama and llama.cpp at the end", {"export": ["q8_0"]}),
}


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("run.yaml"), show_default=True,
              help="The file that is written.")  # fmt: skip
@click.option("--data", help="The answer to the first question.")
@click.option("--model", help="To the second.")
@click.option("--goal", type=click.Choice(list(GOALS)), help="To the third.")
def command(output: Path, data: str | None, model: str | None, goal: str | None) -> None:
    """Ask three questions (data, model, goal) and write run.yaml for `slimtune train --config`.

    What is given as an option isn't asked. Without a terminal nothing is asked. Whether the model trains on this
    machine is said as `slimtune plan` knows it.
    """
    if output.exists():
        raise UserError(f"{output} is there already", way_out="Choose another file (-o), or delete it.")
    missing = [f"--{name}" for name, value in (("data", data), ("model", model), ("goal", goal)) if value is None]
    if missing and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(
            "init asks in a terminal, and here is none",
            rule=f"Without one, it is told: {' '.join(missing)}",
            way_out="Or begin with the documented defaults: slimtune config > run.yaml",
        )
    check_writable(output.parent)
    data = _given(data, check_files) or _asked(
        told("What is it to learn from? A file, a folder, or a hub id."), check_files
    )
    model, fit = _looked_at(_given(model, _check_model))
    goal = goal or _chosen(told("What for?"), {name: told(each.title) for name, each in GOALS.items()}, _refuse)
    shorter = {} if fit.max_length is None else {"max_length": fit.max_length}
    _write(output, {"model": model, "data": [data], **GOALS[goal].keys, **shorter})
    command_line = f"slimtune train --config {shlex.quote(str(output))}"
    lines = {f"{command_line} --dry-run": told("what it would do"), command_line: told("train")}
    width = max(map(len, lines))
    click.echo("\n" + told(f"{output} is written.") + "\n")
    click.echo("\n".join(f"  {line:<{width}}  {what}" for line, what in lines.items()))


def _looked_at(model: str | None) -> tuple[str, Fit]:
    """The model, asked for unless it is given, and whether it trains here: one that doesn't is asked about."""
    if model is not None:
        return model, _told_fit(model)
    cached = cached_models()[:_MOST_MODELS]
    look_for_hub(*cached)
    here = {name: _fit(name) for name in cached}
    names = [name for name, fit in here.items() if fit.trains is not False]
    models = {name: _where(name, here.get(name)) for name in dict.fromkeys([*names, EMBEDDED, Config().model, *here])}
    while True:
        model = _chosen(told("Which model? A number, a folder, or a hub id."), models, _check_model)
        fit = _told_fit(model)
        if fit.trains is not False or click.confirm(told("  Take it all the same?")):
            return model, fit


def _check_model(name: str) -> None:
    """One that isn't here yet and can't be had now is good enough for a file."""
    check_name(name)
    look_for_hub(name)


def _told_fit(model: str) -> Fit:
    """Whether a model trains here, and say it."""
    fit = _fit(model)
    click.echo()
    _echo(*fit.said)
    return fit


def _fit(model: str) -> Fit:
    from slimtune.cli.bar import busy

    with busy(f"looking whether {model} fits"):  # to load torch takes seconds
        return fit_here(model)


def _given(value: str | None, check: Callable[[str], None]) -> str | None:
    if value is not None:
        check(value)
    return value


def _asked(question: str, check: Callable[[str], None]) -> str:
    """The answer to a question, asked until it holds."""
    click.echo(f"\n{question}")
    while True:
        answer = str(click.prompt("", prompt_suffix="> ")).strip()
        try:
            check(answer)
        except SlimtuneError as error:
            _show(error)
            continue
        return answer


def _chosen(question: str, choices: dict[str, str], check: Callable[[str], None]) -> str:
    """One of the choices, by its number, or another answer that holds."""
    names, width = list(choices), max(map(len, choices))
    lines = [
        line
        for at, (name, what) in enumerate(choices.items(), 1)
        for line in _beside(f"  {at}  {name:<{width}}  ", what)
    ]

    def taken(answer: str) -> None:
        if not answer.isdigit():
            if answer not in names:
                check(answer)
        elif not 1 <= int(answer) <= len(names):
            raise UserError(f"there is no {answer}", way_out=f"A number from 1 to {len(names)}.")

    answer = _asked("\n".join([question, *lines]), taken)
    return names[int(answer) - 1] if answer.isdigit() else answer


def _beside(label: str, text: str) -> list[str]:
    """A text beside its label, in lines broken between words."""
    first, *more = folded(text, shutil.get_terminal_size().columns - len(label))
    return [label + first, *(" " * len(label) + line for line in more)]


def _refuse(answer: str) -> None:
    raise UserError(f"{answer!r} is none of these", way_out="A number, or its word.")


def _show(error: SlimtuneError) -> None:
    _echo(*error.said())


def _echo(*lines: str) -> None:
    for line in lines:
        click.echo("\n".join(f"  {part}" for part in folded(line, _WIDTH)))


def _where(name: str, fit: Fit | None) -> str:
    """What is said of a model that is offered; ``fit`` of one that is here."""
    if name == EMBEDDED:
        return told("135 M parameters, comes with a package: to try things out")
    if fit is None:
        return told("downloaded when it trains")
    match fit.trains:
        case True:
            return told("on this machine, trains here")
        case False:
            return told("on this machine, doesn't train here")
    return told("on this machine")


def _write(output: Path, values: dict[str, Any]) -> None:
    lines = ["# " + told("What `slimtune train --config` reads. `slimtune config` prints every key with its default.")]
    for key, value in Config.make(**values).model_dump(mode="json", include=set(values)).items():
        meaning = " ".join((Config.model_fields[key].description or "").split())
        lines += ["", *(f"# {line}" for line in folded(told(meaning), 110))]
        lines.append(f"{key}: {flow(value)}")
    try:
        replace_file(output, "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{output} can't be written: {error.strerror}", way_out="Choose another file (-o).") from None
