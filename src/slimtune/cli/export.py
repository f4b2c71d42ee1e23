"""``slimtune export RUN -o FOLDER``: GGUF with an Ollama Modelfile; the commands for MLX and vLLM."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from slimtune.cli.early import check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.run.durable import check_new

__all__ = ["command"]


@click.command()
@click.argument("target", metavar="RUN", type=PATH_OR_NAME)
@click.option(
    "--to",
    "kind",
    type=click.Choice(["f16", "q8_0", "q4_k_m", "vllm", "mlx"]),
    default="q8_0",
    show_default=True,
    help="A GGUF precision; or say the command for vLLM or MLX.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The new folder; needed for GGUF.")
@click.option("--base", metavar="PATH", help="Where the adapter's base lies now, if it was moved.")
@click.option("--parity/--no-parity", default=True, help="Prove that the export says the same  [on]")
def command(target: str, kind: Any, output: Path | None, base: str | None, parity: bool) -> None:
    """Export RUN as GGUF for llama.cpp and Ollama, with a Modelfile and a parity certificate beside it."""
    check_target(target)
    if kind not in ("vllm", "mlx"):
        if output is None:
            raise click.UsageError("-o FOLDER is missing")
        check_new(output)
    with fast_imports():
        from slimtune.cli.bar import busy
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.export import check_needs, export_gguf
        from slimtune.use.load import find

    if kind in ("vllm", "mlx"):
        click.echo(_command(target, base, kind))
        return
    assert output is not None
    check_needs(kind)
    with upstream_to_log(None), busy(f"exporting as {kind}"):
        certificate = export_gguf(find(target, base=base), output, kind, parity=parity)
    if certificate is not None:
        say(certificate.line())
    say(f"exported to {output}; with Ollama: ollama create {output.name} -f {output / 'Modelfile'}")


def _command(target: str, base: str | None, kind: str) -> str:
    from slimtune.serve.models import find_all
    from slimtune.serve.vllm import vllm_command

    if kind == "mlx":
        words = ["slimtune", "merge", target, "-o", "merged", *(("--base", base) if base else ())]
        return (
            f"{shlex.join(words)}\n"
            "mlx_lm.convert --hf-path merged --mlx-path mlx -q   # on a Mac, after: pip install mlx-lm"
        )
    return shlex.join(vllm_command(find_all([target], base=base), "127.0.0.1", 8000, batch=16))
