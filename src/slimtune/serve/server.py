"""The web server around the application, and how it stops."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from slimtune.serve.address import url_of
from slimtune.serve.api import Api

__all__ = ["WebServer", "run"]


def run(api: Api, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then end what is under way (5 s at most) and return.

    Args:
        api: The application.
        listening: From :func:`slimtune.serve.address.listen`.
        ready: Called with the URL when requests are answered.
    """
    # uvicorn raises the signal that stopped it once more, for whoever was there before. Here nobody was: it is done.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        WebServer(api, lambda: ready(url_of(listening))).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class WebServer(uvicorn.Server):
    """uvicorn around the application, without logs of its own and without code beyond what HTTP/1.1 needs.

    Args:
        api: The application.
        ready: Called when requests are answered.
    """

    def __init__(self, api: Api, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                api.app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=5,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()
