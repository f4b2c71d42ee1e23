"""The web server around the application, and how it stops."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from slimtune.errors import SlimtuneError
from slimtune.serve.address import url_of
from slimtune.serve.connection import WAITING_OUTSIDE, connection_type, places
from slimtune.serve.installed import check_uvicorn
from slimtune.serve.limits import Limits
from slimtune.serve.thread import CallingThread
from slimtune.words import told

__all__ = ["Served", "WebServer", "run"]

# How long ending may take in all (5 s were promised, and a signal is seen a tenth of a second later), and what of it
# the requests under way have to come to their end by themselves.
_PROMISED_SECONDS, _PATIENCE_SECONDS = 4.5, 3.0


class Served(Protocol):
    """An application that :class:`WebServer` can be put around."""

    app: Starlette
    limits: Limits
    fault: SlimtuneError | None
    """Why it can't go on, once it can't."""

    def check(self) -> None:
        """Look whether it can."""

    async def finish(self, seconds: float) -> None:
        """Let nobody in any more, and the requests under way end within ``seconds``."""


def run(
    api: Served,
    listening: socket.socket,
    computing: CallingThread,
    ready: Callable[[str], None],
    overdue: Callable[[], object] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then end what is under way (in 5 s) and return.

    The server has a thread of its own; this one computes.

    Args:
        api: The application.
        listening: From :func:`slimtune.serve.address.listen`.
        computing: The application's.
        ready: Called with the URL when requests are answered.
        overdue: Called when the 5 s are over and this hasn't returned: a step of a large model can't be interrupted.

    Raises:
        SlimtuneError: An engine can't answer, or has stopped.
        UserError: The process may open too few files.
    """
    web = WebServer(api, lambda: ready(url_of(listening)), overdue)
    before = {number: signal.signal(number, web.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="slimtune-web") as thread:
            serving = thread.submit(web.run, sockets=[listening])
            serving.add_done_callback(lambda _: computing.shutdown())
            computing.run()
        serving.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if api.fault is not None:
        raise api.fault


class WebServer(uvicorn.Server):
    """uvicorn around the application, without logs of its own and without code beyond what HTTP/1.1 needs.

    Args:
        api: The application.
        ready: Called when requests are answered.
        overdue: Called when ending takes longer than was promised, unless the process is gone by then.

    Raises:
        UserError: The installed uvicorn isn't as it must be, or the process may open too few files.
    """

    def __init__(self, api: Served, ready: Callable[[], None], overdue: Callable[[], object] | None = None) -> None:
        check_uvicorn()
        room = places(api.limits)
        super().__init__(
            uvicorn.Config(
                api.app,
                loop="asyncio",
                http=connection_type(api.limits, room.connections),
                backlog=room.backlog,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=1,
            )
        )
        self._api, self._ready, self._overdue = api, ready, overdue

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets=sockets)
        for listening in sockets or ():
            listening.listen(WAITING_OUTSIDE)  # asyncio takes what it accepts at a time for how many may wait
        if self.started and self._api.fault is None:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, and say so at once: what is under way may take its seconds."""
        if not self.should_exit:
            begin = "\n" if sys.stderr.isatty() else ""  # behind the terminal's ^C
            sys.stderr.write(f"{begin}{told('slimtune: ending')}\n")
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end: because it was asked to, or because an engine has stopped."""
        self._api.check()
        return await super().on_tick(counter) or self._api.fault is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end, tell those that don't why they are ended, and close."""
        if self._overdue is not None and self._api.fault is None:
            timer = threading.Timer(_PROMISED_SECONDS, self._overdue)
            timer.daemon = True
            timer.start()
        for server in self.servers:
            server.close()
        await self._api.finish(_PATIENCE_SECONDS)
        await super().shutdown(sockets)
