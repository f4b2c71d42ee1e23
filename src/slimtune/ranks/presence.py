"""Knows when another rank's process ends, however it does: nobody waits for one that is no more.

Each rank holds a connection to rank 0, which the kernel closes with the process. A rank that stops says why first, and
rank 0 tells the others. Whoever is then in a sum that can't come to its end (a GPU's can't be broken off from outside)
ends a few seconds later.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from slimtune.errors import SlimtuneError
from slimtune.ranks.meeting import as_told, word_of

__all__ = ["Presence"]

_GONE = "its process is gone"
_GRACE = 10.0
"""Seconds that this process has to end by itself once another is gone."""


class Presence:
    """One rank's connections.

    Args:
        rank: This process's.
        count: Of all.
        address: Rank 0's host, as the others reach it.
        share: Gives every rank what it is given at rank 0.
        seconds: That the others have to come.

    Raises:
        OSError: One didn't.
    """

    def __init__(self, rank: int, count: int, address: str, share: Callable[[Any], Any], seconds: float) -> None:
        self.rank = rank
        self.resume = ""
        """How to go on; makes the message."""
        self.lost: dict[str, Any] | None = None
        self._known = threading.Event()
        self._left = False
        self._peers: dict[Connection, int] = {}
        if rank == 0:
            with _door(address, count) as door:
                key = secrets.token_hex(16)
                share((door.getsockname()[1], key))
                door.settimeout(seconds)
                while len(self._peers) < count - 1:
                    peer = Connection(door.accept()[0].detach())
                    given, _, number = peer.recv_bytes(64).partition(b" ")
                    if secrets.compare_digest(given, key.encode()):
                        self._peers[peer] = int(number)
        else:
            port, key = share(None)
            opened = socket.create_connection((address, port), seconds)
            opened.settimeout(None)
            peer = Connection(opened.detach())
            peer.send_bytes(f"{key} {rank}".encode())
            self._peers[peer] = 0
        for peer in self._peers:
            _keep_alive(peer)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def leave(self) -> None:
        """This rank is done, and nobody is to wait for it."""
        self._left = True
        self._tell({"done": True})

    def fail(self, error: BaseException) -> None:
        """This rank ends, and so must the others."""
        self._left = True
        self._tell(word_of(self.rank, error))

    @property
    def speaks(self) -> bool:
        """Whether this rank tells the person what happened: the first, or the second where the first's process is
        gone."""
        first_is_gone = self.lost is not None and self.lost["rank"] == 0 and self.lost["what"] == _GONE
        return self.rank == first_is_gone

    def check(self) -> None:
        """Stop here if another rank is gone.

        Raises:
            SlimtuneError: It is; with what it said, and its kind.
        """
        if self.lost is not None:
            raise self.error()

    def learn(self, seconds: float = 3.0) -> bool:
        """Whether another rank is known to be gone, waiting for that a moment: something was cut off."""
        return self._known.wait(seconds)

    def error(self) -> SlimtuneError:
        """What became of the rank that is gone."""
        assert self.lost is not None
        return as_told(self.lost, self.resume)

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers):
            try:
                peer.send_bytes(json.dumps(message).encode())
            except OSError:
                continue  # it is gone itself

    def _watch(self) -> None:
        while self._peers and self.lost is None:
            for peer in wait(list(self._peers)):
                assert isinstance(peer, Connection)
                message = self._heard(peer)
                if message.get("done"):
                    del self._peers[peer]
                elif not self._left:
                    self.lost = message
                    del self._peers[peer]
                    break
                else:
                    del self._peers[peer]
        if self.lost is None:
            return
        self._tell(self.lost)
        self._known.set()
        time.sleep(_GRACE)
        if self._left:
            return
        error = self.error()
        if self.speaks:
            sys.stderr.write("slimtune: " + "\n".join(error.said()) + "\n")
            sys.stderr.flush()
        os._exit(error.exit_code)

    def _heard(self, peer: Connection) -> dict[str, Any]:
        """What a rank says; a connection that ends says that its process did."""
        rank = self._peers[peer]
        try:
            message: dict[str, Any] = json.loads(peer.recv_bytes(1 << 20))
        except (EOFError, OSError):
            return {"rank": rank, "what": _GONE}
        return message


def _door(address: str, count: int) -> socket.socket:
    """Where the other ranks come in: at the name that they know this host by, or at all of its if that isn't one."""
    try:
        return socket.create_server((address, 0), backlog=count)
    except OSError:
        return socket.create_server(("", 0), backlog=count)


def _keep_alive(peer: Connection) -> None:
    """A host that lost its power closes no connection: ask it every few seconds."""
    with socket.socket(fileno=os.dup(peer.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
