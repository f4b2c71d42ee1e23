"""``slimtune config``: the documented defaults, or another tool's config in slimtune's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import yaml

from slimtune.config import Config, read_yaml
from slimtune.errors import UserError
from slimtune.foreign import Line, recognised, translated
from slimtune.width import folded
from slimtune.words import told, told_cell

__all__ = ["command", "flow"]


@click.command()
@click.option("--schema", is_flag=True, help="Print a JSON schema instead, for editors.")
@click.option(
    "--from",
    "foreign_file",
    type=click.Path(path_type=Path),
    help="Translate a YAML file of axolotl, LLaMA-Factory, mlx-lm, TRL or ms-swift.",
)
def command(schema: bool, foreign_file: Path | None) -> None:
    """Print every config key with its meaning and default, as YAML that `--config` reads."""
    if schema:
        click.echo(json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False))
    elif foreign_file is not None:
        click.echo(from_foreign(foreign_file), nl=False)
    else:
        click.echo(documented_defaults(), nl=False)


def from_foreign(path: Path) -> str:
    """Another tool's config as slimtune's YAML; what has no counterpart stands there as a comment.

    Raises:
        UserError: The file can't be read, or is no tool's that slimtune knows.
    """
    values = read_yaml(path)
    tool = recognised(values)
    if tool is None:
        own = values.keys() & Config.model_fields.keys()
        raise UserError(
            f"{path} is slimtune's own, or nearly: there is nothing to translate"
            if own
            else f"{path} is the file of no tool that is known here",
            rule="Files of axolotl, LLaMA-Factory, mlx-lm, TRL and ms-swift are translated.",
        )
    lines = translated(values, tool)
    together: dict[str, Any] = {}
    for line in lines:
        together = {**line.becomes, **together}
    made: dict[str, Any] = {}
    written = [_yaml_line(line, made, together) for line in lines if not line.is_default]
    defaults = [text for line in lines if line.is_default and (text := _yaml_line(line, made, together))]
    head = [told(f"# {path.name}, which is {tool.name}'s, in slimtune's words.")]
    if defaults:
        defaults = ["", told(f"# What it leaves to {tool.name}'s defaults, where slimtune's differ."), *defaults]
    return "\n".join([*head, *written, *defaults]) + "\n"


def _yaml_line(line: Line, made: dict[str, Any], together: dict[str, Any]) -> str:
    """One key of the other tool as YAML.

    Args:
        line: The key.
        made: What stands there already; what this line adds goes in.
        together: What the whole file becomes, for values that go with others only.
    """
    source = f"# {line.key}: {' '.join(flow(line.value).split())}"
    if not line.becomes:
        return f"{source} — {told_cell(line.note)}"
    written = []
    for key, value in line.becomes.items():
        if key in made:
            if made[key] != value:
                written.append(f"{source} — {told_cell(f'would be {key}: {flow(value)}')}")
            continue
        refused = _refused({key: value}) and _refused({**together, key: value})
        if refused:
            not_that = told_cell(f"{key} can't be that: {told(refused)}")
            written.append(f"{source} — {not_that}")
            continue
        if line.is_default and value == getattr(Config(), key):
            continue
        made[key] = value
        written.append(f"{key}: {flow(value)}  # {line.key}{f' — {told_cell(line.note)}' if line.note else ''}")
    return "\n".join(written) or ("" if line.is_default else f"{source} — {told_cell('as above')}")


def _refused(values: dict[str, Any]) -> str:
    """Why these values can't be a config's, or nothing."""
    try:
        Config.make(**values)
    except UserError as error:
        return error.rule
    return ""


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def documented_defaults() -> str:
    """The defaults as YAML, each key under its documentation."""
    lines = [
        "# "
        + told("slimtune's defaults. Keys are the flags of `slimtune train` with _ for -; flags win over this file.")
    ]
    defaults: dict[str, Any] = Config().model_dump(mode="json")
    for name, field in Config.model_fields.items():
        description = " ".join((field.description or "").split())
        lines += ["", *(f"# {line}" for line in folded(told(description), 110))]
        lines.append(f"{name}: {flow(defaults[name])}")
    return "\n".join(lines) + "\n"
