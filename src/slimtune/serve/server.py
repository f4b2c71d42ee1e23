"""One process that listens: the socket, the web server around the application, and how it stops."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from slimtune.errors import UserError
from slimtune.serve.api import Api
from slimtune.serve.door import is_loopback

__all__ = ["WebServer", "check_address", "listen", "run", "url_of"]

# A client that takes nothing of what is ready for it loses its connection after this, whatever else is open.
_STUCK_MILLISECONDS = 30_000


def check_address(host: str, key: str | None) -> None:
    """Only loopback without a key.

    Raises:
        UserError: Another address, and no key.
    """
    if key is None and not is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines",
            rule="That takes an API key.",
            way_out="Give one by SLIMTUNE_API_KEY or --api-key-file, or leave --host out.",
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UserError: The address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"{host}:{port} can't be listened on: {error.strerror}", way_out="Choose another --port."
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MILLISECONDS)
    return made


def run(api: Api, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then end what is under way (5 s at most) and return.

    Args:
        api: The application.
        listening: From :func:`listen`.
        ready: Called with the URL when requests are answered.
    """
    # uvicorn raises the signal that stopped it once more, for whoever was there before. Here nobody was: it is done.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        WebServer(api, lambda: ready(url_of(listening))).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def url_of(listening: socket.socket) -> str:
    """Where a client finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
