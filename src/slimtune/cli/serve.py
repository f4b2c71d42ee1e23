"""``slimtune serve RUN [RUN ...]``: the OpenAI API over one base and its adapters."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from slimtune.cli.early import check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.cli.using import model_options
from slimtune.errors import UserError

__all__ = ["command"]


@click.command()
@click.argument("targets", metavar="RUN...", nargs=-1, required=True, type=PATH_OR_NAME)
@click.option("--host", default="127.0.0.1", show_default=True, help="Another address than loopback takes an API key.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--api-key", envvar="SLIMTUNE_API_KEY", metavar="KEY", help="What clients must show.  [SLIMTUNE_API_KEY]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="A file that holds it.")
@click.option("--batch", default=16, show_default=True, metavar="N", help="Most requests computed together.")
@click.option("--waiting", default=64, show_default=True, metavar="N", help="Most that wait; then 503.")
@click.option("--max-body", "body_bytes", default=262144, show_default=True, metavar="BYTES", help="Largest request.")
@click.option("--max-prompt", "prompt_tokens", default=4096, show_default=True, metavar="N", help="Longest prompt.")
@click.option("--max-new-tokens", "output_tokens", default=1024, show_default=True, metavar="N", help="Longest reply.")
@click.option(
    "--max-seconds", "seconds", default=300.0, show_default=True, metavar="S", help="Most time for a request."
)
@click.option("--connections", default=512, show_default=True, metavar="N", help="Most connections at a time.")
@click.option("--cache-tokens", default=8192, show_default=True, metavar="N", help="Tokens kept in memory, per model.")
@click.option("--log", type=click.Path(path_type=Path), help="A file for faults and upstream's words.")
@click.option("--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True)
@click.option("--dry-run", is_flag=True, help="With --engine vllm: print its command and stop.")
@model_options
def command(
    targets: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    api_key_file: Path | None,
    log: Path | None,
    engine: str,
    dry_run: bool,
    base: str | None,
    quantization: str | None,
    compute_dtype: str | None,
    trust_remote_code: bool,
    **limits: Any,
) -> None:
    """Serve each RUN under its name (NAME=RUN gives another), and their base under its own, by the OpenAI API.

    Requests that come together are computed together. `/` is a page to try it; `/health` and `/metrics` are for
    machines. Ctrl-C ends it.
    """
    for target in targets:
        path = target.partition("=")[2]
        check_target(target if not path or Path(target).exists() else path)
    with fast_imports():
        from slimtune.cli.bar import busy
        from slimtune.run.quiet import upstream_to_log
        from slimtune.serve.address import check_address, listen
        from slimtune.serve.installed import check_installed
        from slimtune.serve.models import find_all, open_all

    key = _key(api_key, api_key_file)
    check_address(host, key)
    if engine == "vllm":
        from slimtune.serve.vllm import replace_process, vllm_command

        found = find_all(targets, base=base, trust_remote_code=trust_remote_code)
        words = vllm_command(found, host, port, limits["batch"])
        if dry_run:
            click.echo(shlex.join(words))
            return
        replace_process(words, key)
    if dry_run:
        raise click.UsageError("--dry-run goes with --engine vllm")
    check_installed("slimtune serve", "starlette", "uvicorn", "prometheus_client")
    from slimtune.serve.limits import Limits

    bounds = Limits(**limits)
    # First of all the port: that it is taken should be said before a model is loaded.
    with listen(host, port) as listening, upstream_to_log(log):
        from slimtune.serve.api import Api
        from slimtune.serve.log import seldom
        from slimtune.serve.server import run
        from slimtune.serve.thread import CallingThread
        from slimtune.use.attention import any_length

        with busy("loading the model"):
            found = find_all(targets, base=base, trust_remote_code=trust_remote_code)
            models = open_all(found, quantization=quantization, dtype=compute_dtype)
        computing = CallingThread()
        api = Api(models, bounds, computing, key)
        if api.slow is not None:
            say(api.slow, err=True)
        with any_length(), seldom():
            own = bool(click.get_current_context().find_root().obj.get("own_process"))
            served = ", ".join(models)
            run(api, listening, computing, lambda url: say(f"serving {served} on {url}"), _leave if own else None)
    if own:
        _leave()


def _leave() -> NoReturn:
    """End the process here: to take torch and the models apart in order takes seconds on a busy machine."""
    sys.stdout.flush()
    os._exit(0)


def _key(given: str | None, file: Path | None) -> str | None:
    if file is not None:
        try:
            given = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the API key's file can't be read: {error}") from None
    if given is None:
        return None
    given = given.strip()
    if not given:
        raise UserError("the API key is empty")
    if not (given.isascii() and given.isprintable()):
        raise UserError(
            "the API key has a character that no header carries as it is",
            rule="Clients send it in a header: printable ASCII.",
            way_out="Make another: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    return given
