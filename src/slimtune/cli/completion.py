"""``slimtune completion SHELL``: what makes a shell complete verbs, flags and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["command"]

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete slimtune's verbs and flags.

    \b
    bash  echo 'eval "$(slimtune completion bash)"' >> ~/.bashrc
    zsh   echo 'eval "$(slimtune completion zsh)"' >> ~/.zshrc
    fish  slimtune completion fish > ~/.config/fish/completions/slimtune.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "slimtune", "_SLIMTUNE_COMPLETE").source())
