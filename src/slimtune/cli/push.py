"""``slimtune push RUN OWNER/NAME``: publish the adapter with its model card."""

from __future__ import annotations

import click

from slimtune.cli.early import check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME

__all__ = ["command"]


@click.command()
@click.argument("target", metavar="RUN", type=PATH_OR_NAME)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--base", metavar="PATH", help="Where the adapter's base lies now, if it was moved.")
@click.option("--public", is_flag=True, help="Make a new repository public; it is private otherwise.")
def command(target: str, repository: str, base: str | None, public: bool) -> None:
    """Publish RUN's adapter, tokenizer and model card on the hub.

    A folder (./out) instead of OWNER/NAME gets the same files, to look at before.
    """
    check_target(target)
    with fast_imports():
        from slimtune.cli.bar import busy
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.load import find
        from slimtune.use.push import push

    with upstream_to_log(None), busy("publishing"):
        where = push(find(target, base=base), repository, private=not public)
    say(f"published: {where}")
