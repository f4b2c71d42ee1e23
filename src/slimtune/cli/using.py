"""The flags that the verbs after training share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from slimtune.cli.formatting import say

if TYPE_CHECKING:
    from slimtune.use.load import Opened

__all__ = ["model_options", "sampling_options", "say_if_slow"]

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """How the model is opened: base, quantisation, dtype, remote code."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
        click.option(
            "--quantization",
            type=click.Choice(["nf4", "none"]),
            help="The base's quantisation.  [as in training; nf4 for a bare model]",
        ),
        click.option(
            "--compute-dtype",
            type=click.Choice(["bf16", "fp16", "fp32"]),
            help="What is computed in; in fp32 replies depend least on the machine.  [what is fastest here]",
        ),
        click.option("--base", metavar="PATH", help="Where the adapter's base lies now, if it was moved."),
    ):
        function = option(function)
    return function


def sampling_options(function: F) -> F:
    """How tokens are chosen."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Seed of the draws."),
        click.option("--max-new-tokens", default=512, show_default=True, metavar="N", help="Most tokens of a reply."),
        click.option("--top-k", default=0, show_default=True, metavar="N", help="Draw from N likeliest; 0: from all."),
        click.option(
            "--top-p", default=1.0, show_default=True, metavar="P", help="Draw from those that have probability P."
        ),
        click.option("--temperature", default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token."),
    ):
        function = option(function)
    return function


def say_if_slow(opened: Opened) -> None:
    """Tell, in one line, where this model's replies are computed in a slower way than others', and why."""
    from slimtune.use.way import way_of

    slow = way_of(opened).slow
    if slow is not None:
        say(slow, err=True)
