"""Where a server listens: loopback, or another address with a key."""

from __future__ import annotations

import ipaddress
import os
import socket

from slimtune.errors import UserError

__all__ = ["check_address", "is_loopback", "listen", "url_of"]

# A client that takes nothing of what is ready for it loses its connection after this, whatever else is open.
_STUCK_MILLISECONDS = 30_000


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
            f"{host}:{port} can't be listened on: {os.strerror(error.errno or 0)}", way_out="Choose another --port."
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MILLISECONDS)
    return made


def url_of(listening: socket.socket) -> str:
    """Where a client finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
