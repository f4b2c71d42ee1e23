"""Command-line flags made from the config's own fields: one source for names, defaults and help."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from slimtune.config import Config, load_config
from slimtune.errors import UserError

__all__ = ["config_from_flags", "config_options", "grouped_command", "some_config_options"]

F = TypeVar("F", bound=Callable[..., Any])
_SEVERAL = re.compile(r",(?=[\w-]+=)")
"""Between a=b and c=d; a column's name may hold a comma."""
# Given as arguments or by a verb itself, not as flags made here.
_NOT_FLAGS = {"model", "data", "output", "start_from"}


_GROUPS = {
    "model": "What",
    "quantization": "The base in 4 bits",
    "lora_r": "LoRA",
    "format": "Data",
    "epochs": "Training",
    "save_steps": "Saving, watching, stopping",
    "export": "After training",
}
"""Titles of the config's parts, by the first key of each."""


def grouped_command(title: str, *first: str) -> type[click.Command]:
    """A command whose help shows flags in groups: under ``title`` those that people need first, then the config's
    parts, then the verb's own.

    Args:
        title: Of the first group.
        first: Names of the parameters in it, in their order.
    """
    groups, group = {}, ""
    for name in Config.model_fields:
        group = _GROUPS.get(name, group)
        groups[name] = group

    class Grouped(click.Command):
        def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            records = {
                str(param.name): param.get_help_record(ctx)
                for param in self.get_params(ctx)
                if isinstance(param, click.Option)
            }
            shown = {title: [records.pop(name) for name in first]}
            for name, record in records.items():
                shown.setdefault(groups.get(name, "Other"), []).append(record)
            for heading, lines in sorted(shown.items(), key=lambda item: item[0] == "Other"):
                with formatter.section(heading):
                    formatter.write_dl([line for line in lines if line is not None])

    return Grouped


def config_options(function: F) -> F:
    """Give a click command `--config FILE` and one flag for each key of the config."""
    return some_config_options(*(name for name in Config.model_fields if name not in _NOT_FLAGS))(function)


def some_config_options(*names: str) -> Callable[[F], F]:
    """Give a click command `--config FILE` and one flag for each of these keys of the config."""

    def decorate(function: F) -> F:
        for name in reversed(names):
            field = Config.model_fields[name]
            function = _option(name, field.annotation, field.default, field.description or "")(function)
        return click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file; flags win.")(
            function
        )

    return decorate


def config_from_flags(config_file: Path | None, flags: dict[str, Any]) -> Config:
    """The config of a YAML file and the flags that were given; flags win."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    for name in ("map", "rank_pattern", "alpha_pattern"):
        if name in given:
            parts = (part for text in given[name] for part in (_SEVERAL.split(text) if name == "map" else [text]))
            given[name] = dict(_pair(name, part) for part in parts)
    if "template_vars" in given:
        given["template_vars"] = {k: _json(v) for k, v in (_pair("template_vars", t) for t in given["template_vars"])}
    return load_config(config_file, **given)


def _json(text: str) -> Any:
    """A value as JSON, and as text where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _pair(name: str, text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals or not left or not right:
        raise UserError(f"--{name.replace('_', '-')} {text!r}", rule="It is written name=value.")
    return left, right


def _option(name: str, annotation: Any, default: Any, description: str) -> Callable[[F], F]:
    flag = "--" + name.replace("_", "-")
    text = " ".join(description.split())
    if annotation is bool:
        return click.option(
            f"{flag}/--no-{name.replace('_', '-')}", name, default=None, help=_with_default(text, default)
        )
    if _is_mapping(annotation):
        return click.option(flag, name, multiple=True, metavar="NAME=VALUE", help=text)
    if name == "eval":
        return click.option(flag, name, multiple=True, metavar="DATA", help=text)
    choices = _choices(annotation)
    if choices:
        return click.option(flag, name, default=None, type=click.Choice(choices), help=_with_default(text, default))
    return click.option(flag, name, default=None, metavar=_metavar(annotation), help=_with_default(text, default))


def _with_default(text: str, default: Any) -> str:
    if default is None:
        return text
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text}  [{default}]" if default != "" else text


def _parts(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for part in typing.get_args(annotation) if part is not type(None)]
    return [annotation]


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _choices(annotation: Any) -> list[str]:
    parts = _parts(annotation)
    if len(parts) == 1 and typing.get_origin(parts[0]) is typing.Literal:
        return [str(choice) for choice in typing.get_args(parts[0])]
    return []


def _metavar(annotation: Any) -> str:
    text = repr(annotation)
    for mark, metavar in (("Path", "FILE"), ("tuple[str", "NAMES"), ("float", "NUMBER"), ("int", "N")):
        if mark in text:
            return metavar
    return "TEXT"
