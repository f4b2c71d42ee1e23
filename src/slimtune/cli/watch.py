"""``slimtune watch RUN [RUN ...]``: a live page of runs, on this machine alone."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimtune.cli.formatting import say
from slimtune.errors import UserError
from slimtune.language import language
from slimtune.run.folder import RunFolder
from slimtune.width import cells
from slimtune.words import told

if TYPE_CHECKING:
    from slimtune.serve.server import WebServer

__all__ = ["beside", "check_page", "command"]

_TOKEN = "SLIMTUNE_WATCH_TOKEN"
"""The environment variable by which a training hands its page's token on: anyone can read a command line."""
_HOST, _PORT = "127.0.0.1", 8010
_LAST_SECONDS = 2.0
"""How long the end of a training waits for its page's."""


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), help=f"0 takes a free one.  [{_PORT}, or else a free one]")
@click.option("--beside", "descriptor", type=int, hidden=True, help="A training's socket; standard input ends it.")
def command(runs: tuple[Path, ...], port: int | None, descriptor: int | None) -> None:
    """Show each RUN on a page that goes along: curves, time left, replies to held-out prompts, what went wrong.

    A run may be going, ended or stopped; several are drawn over each other. The page has a button that stops a run with
    a checkpoint. It is reached from this machine alone, at the address that is printed. Ctrl-C ends it.
    """
    if descriptor is None:
        for run in runs:
            RunFolder.open(run)
    check_page()
    token = os.environ.pop(_TOKEN, "") or secrets.token_urlsafe(24)
    with _listening(port) if descriptor is None else socket.socket(fileno=descriptor) as listening:
        from slimtune.run.live import LiveRun
        from slimtune.serve.server import WebServer
        from slimtune.serve.watching import Watching

        names = [run.resolve().name for run in runs]
        called = names if len(set(names)) == len(names) else list(map(str, runs))
        live = [LiveRun(run, name) for run, name in zip(runs, called, strict=True)]
        watching = Watching(live, token, lambda line: click.echo(f"slimtune watch: {told(line)}", err=True))
        said = ", ".join(map(str, runs))

        def ready() -> None:
            if descriptor is None:
                say(f"watching {said} on {_url(listening, token)}")
                if port is None and (taken := _elsewhere(listening)):
                    say(taken, err=True)

        web = WebServer(watching, ready)
        if descriptor is not None:
            threading.Thread(target=_end_with_input, args=(web,), daemon=True).start()
        with suppress(KeyboardInterrupt):  # uvicorn has ended by then, and tells again what ended it
            web.run(sockets=[listening])
    if watching.fault is not None:
        raise watching.fault


def _end_with_input(web: WebServer) -> None:
    """The training holds the other end of standard input, whatever becomes of it."""
    sys.stdin.buffer.read()
    web.should_exit = True


def _listening(port: int | None = None) -> socket.socket:
    """Where the page will be: the port that was asked for, or the usual one, or else a free one.

    Raises:
        UserError: The port that was asked for is taken.
    """
    from slimtune.serve.address import listen

    if port is not None:
        return listen(_HOST, port)
    try:
        return listen(_HOST, _PORT)
    except UserError:
        return listen(_HOST, 0)


def _elsewhere(listening: socket.socket) -> str:
    """What to say of a page that isn't on the usual port; nothing where it is."""
    port: int = listening.getsockname()[1]
    return "" if port == _PORT else f"port {_PORT} is taken, so this page has port {port}"


def _url(listening: socket.socket, token: str) -> str:
    """The page's address; it is in Chinese where that is spoken here, else as the browser asks for."""
    from slimtune.serve.address import url_of

    return f"{url_of(listening)}/{token}/{'?lang=zh' if language() == 'zh' else ''}"


def check_page() -> None:
    """See that there can be a page.

    Raises:
        UserError: A library that it needs isn't installed.
    """
    from slimtune.serve.installed import check_installed

    check_installed("the live page", "starlette", "uvicorn")


@contextmanager
def beside(run: Path | None) -> Iterator[None]:
    """Show ``run`` while the body works on it, by a process of its own: it takes nothing of this one's time, and no
    signal that is meant for it. It ends with this process, whatever becomes of that. None: show nothing.
    """
    if run is None:
        yield
        return
    token = secrets.token_urlsafe(24)
    with _listening() as listening:
        label = told("watch")
        click.echo(f"  {label}{' ' * (9 - cells(label))}{_url(listening, token)}", err=True)  # whole, to be clicked
        if taken := _elsewhere(listening):
            click.echo(f"  {'':9}{told(taken)}", err=True)
        program = "from slimtune.cli import main; main()"
        words = [sys.executable, "-c", program, "watch", "--beside", str(listening.fileno()), str(run.absolute())]
        page = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(listening.fileno(),),
            env={**os.environ, _TOKEN: token},
            start_new_session=True,
        )
    try:
        yield
    finally:
        assert page.stdin is not None
        page.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            page.wait(_LAST_SECONDS)
