"""How the verbs that train end: what to do next, or the facts as JSON, and the exit code."""

from __future__ import annotations

import json
import shlex

import click

from slimtune.run.folder import RunFolder
from slimtune.run.verdict import is_worse
from slimtune.words import told

__all__ = ["close"]

WORSE = 4


def close(run: RunFolder, *, as_json: bool) -> None:
    """Say what a run that is done can be used for; exit code 4 if it made the model worse than it was."""
    facts = run.facts()
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        name = shlex.quote(str(run.path))
        lines = {
            f"slimtune chat {name}": told("talk to it"),
            f"slimtune compare {name}": told("base against tuned"),
            f"slimtune explain {name}": told("what was measured"),
            str(run.report_html): told("the same, with curves"),
        }
        width = max(map(len, lines))
        click.echo("\n" + "\n".join(f"  {line:<{width}}  {what}" for line, what in lines.items()), err=True)
    if is_worse(facts):
        raise click.exceptions.Exit(WORSE)
