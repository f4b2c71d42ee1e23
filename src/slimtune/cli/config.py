"""``slimtune config``: the documented defaults."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click
import yaml

from slimtune.config import Config

__all__ = ["command"]


@click.command()
@click.option("--schema", is_flag=True, help="Print a JSON schema instead, for editors.")
def command(schema: bool) -> None:
    """Print every config key with its meaning and default, as YAML that `--config` reads."""
    if schema:
        click.echo(json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False))
    else:
        click.echo(documented_defaults(), nl=False)


def documented_defaults() -> str:
    """The defaults as YAML, each key under its documentation."""
    lines = ["# slimtune's defaults. Keys are the flags of `slimtune train` with _ for -; flags win over this file."]
    defaults: dict[str, Any] = Config().model_dump(mode="json")
    for name, field in Config.model_fields.items():
        description = " ".join((field.description or "").split())
        lines += ["", *(f"# {line}" for line in textwrap.wrap(description, 110))]
        value = yaml.safe_dump(defaults[name], default_flow_style=True, allow_unicode=True, width=1000)
        lines.append(f"{name}: {value.removesuffix('...' + chr(10)).strip()}")
    return "\n".join(lines) + "\n"
