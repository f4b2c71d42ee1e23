"""The web server around the application, and how it stops."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from slimtune.serve.address import url_of
from slimtune.serve.api import Api
from slimtune.serve.thread import CallingThread

__all__ = ["WebServer", "run"]


def run(api: Api, listening: socket.socket, computing: CallingThread, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then end what is under way (5 s at most) and return.

    The server has a thread of its own; this one computes.

    Args:
        api: The application.
        listening: From :func:`slimtune.serve.address.listen`.
        computing: The application's.
        ready: Called with the URL when requests are answered.
    """
    web = WebServer(api, lambda: ready(url_of(listening)))
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
