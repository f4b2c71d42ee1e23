"""``slimtune merge RUN -o FOLDER``: the adapter merged into the 16-bit base."""

from __future__ import annotations

from pathlib import Path

import click

from slimtune.cli.early import check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.run.durable import check_new

__all__ = ["command"]


@click.command()
@click.argument("target", metavar="RUN", type=PATH_OR_NAME)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The merged model's folder.")
@click.option("--base", metavar="PATH", help="Where the adapter's base lies now, if it was moved.")
@click.option("--parity/--no-parity", default=True, help="Prove that the merged model says the same  [on]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def command(target: str, output: Path, base: str | None, parity: bool, trust_remote_code: bool) -> None:
    """Merge RUN's adapter into its 16-bit base, in Transformers' layout.

    Memory is bounded by the largest tensor, or by a layer's experts. The proof, parity.json, loads the model whole;
    --no-parity leaves it out.
    """
    check_target(target)
    check_new(output)
    with fast_imports():
        from slimtune.cli.bar import busy
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.export import prove_merged
        from slimtune.use.load import find
        from slimtune.use.merge import merge

    with upstream_to_log(None), busy("merging"):
        found = find(target, base=base, trust_remote_code=trust_remote_code)
        certificate = merge(found, output, prove=prove_merged if parity else None)
    say(f"merged into {output}")
    if certificate is not None:
        say(certificate.line())
