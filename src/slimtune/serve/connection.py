"""A client's connection: it never waits without an end, and there are never more of them than fit.

uvicorn ends a connection that is idle after an answer, and none whose first request never comes whole; its limit of
concurrency is looked at once a request's head is there. So a client could hold any number of connections for good, and
with them the process's file descriptors. Here each state of a connection has a time, and where all places are taken one
that waits for its client makes room for the newcomer: a client that has something to ask gets in.

Which one, is a matter of what most of the places are taken by. Those that wait are put together by address and by what
they wait for; the largest group gives up the one of it that has waited longest. So many connections of one client cost
another client none, and many that never ask cost those none that have asked before, nor the other way round.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from slimtune.errors import UserError
from slimtune.serve.limits import Limits

__all__ = ["WAITING_OUTSIDE", "Connection", "Places", "connection_type", "places"]

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: 108\r\n\r\n"
    b'{"error": {"message": "too many connections", "type": "server_error", "param": null, "code": "server_busy"}}'
)
WAITING_OUTSIDE = 4096
"""Connections that the system keeps until they are accepted, which costs no descriptor. Of a burst that is larger it
drops some without their clients' knowing."""
# Descriptors for all else that is opened while the server runs: files of the page, the log, a library's own.
_SPARE = 24
_FEWEST = 8
# asyncio takes the whole backlog at a time, and this often before the first of them is counted.
_ROUNDS = 3


@dataclass(frozen=True)
class Places:
    """How many connections there may be, and how many are accepted at a time."""

    connections: int
    backlog: int


def places(limits: Limits) -> Places:
    """As many as asked for, or as the process's limit of descriptors has room for.

    Raises:
        UserError: There is room for hardly any.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return Places(limits.connections, 128)
    own = Path("/proc/self/fd")
    free = most - (sum(1 for _ in own.iterdir()) if own.is_dir() else 64) - _SPARE
    backlog = max(_FEWEST, min(128, free // 8))
    fitting = free - _ROUNDS * backlog
    if fitting < _FEWEST:
        raise UserError(
            f"this process may open {most} files at a time",
            rule="Each connection is one, and the server needs some of its own.",
            way_out="Allow more: ulimit -n 1024",
        )
    return Places(min(limits.connections, fitting), backlog)


class Connection(H11Protocol):
    """uvicorn's connection, with an end to each of its states."""

    most: ClassVar[int]
    """How many there may be."""
    head_seconds: ClassVar[float]
    """Most time from the connection's beginning, or from an answer's end, until a request's head is there."""
    answer_seconds: ClassVar[float]
    """Most time from there until the answer has been written; and then until the client has taken it."""
    _timer: asyncio.TimerHandle | None = None
    _timed: Any = None
    _since = 0.0
    _home = ""
    _answered = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place."""
        super().connection_made(transport)
        self._home = _home(self.client)
        if len(self.connections) > self.most and not self._replaces_another():
            transport.write(_FULL)
            transport.close()
        self._time()

    def data_received(self, data: bytes) -> None:
        """More of a request has come."""
        super().data_received(data)
        self._time()

    def on_response_complete(self) -> None:
        """An answer has been written."""
        self._answered = True
        super().on_response_complete()
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        """The place is free."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def _answering(self) -> Any:
        """The request that is being answered, or whose body still comes; None while one is waited for."""
        return None if self.cycle is None or self.cycle.response_complete else self.cycle

    @property
    def _waits_for(self) -> str | None:
        """What the client has to do next; None while it is the server's turn."""
        if self.transport.get_write_buffer_size() > 0:
            return "take its answer"
        request = self._answering
        if request is not None and (request.response_started or not request.more_body):
            return None
        return "ask again" if self._answered else "ask"

    def _time(self) -> None:
        """Set the end of the state that the connection is in, if it is a new one."""
        state = self._answering
        if self._timer is not None and state is self._timed:
            return
        if self._timer is not None:
            self._timer.cancel()
        seconds = self.head_seconds if state is None else self.answer_seconds
        self._since = self.loop.time()
        self._timer, self._timed = self.loop.call_later(seconds, self._overdue), state

    def _overdue(self) -> None:
        if self._answering is not None:
            self.transport.abort()
            return
        # The last answer may still be on its way to a client that takes it slowly.
        self.transport.close()
        self._timer = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def _replaces_another(self) -> bool:
        """Give up the longest waiting of the largest group of those that wait for their clients, if there are any."""
        waiting = {
            other: (other._home, what)
            for other in self.connections
            if isinstance(other, Connection) and other is not self and (what := other._waits_for) is not None
        }
        if not waiting:
            return False
        sizes = Counter(waiting.values())
        given_up = min(waiting, key=lambda other: (-sizes[waiting[other]], other._since))
        self.connections.discard(given_up)  # now, for more newcomers may be counted before it is really gone
        if waiting[given_up] == (given_up._home, "ask"):  # it may be about to, and is told
            given_up.transport.write(_FULL)
            given_up.transport.close()
        else:
            given_up.transport.abort()
        return True


def _home(client: tuple[str, int] | None) -> str:
    """Whose a connection is: its address; of IPv6 the network, which is one subscriber's."""
    address = "" if client is None else client[0]
    return ipaddress.IPv6Address(address).packed[:8].hex() if ":" in address else address


def connection_type(limits: Limits, most: int) -> type[Connection]:
    """Connections of a server with these limits.

    Args:
        limits: The times.
        most: How many there may be.
    """
    times = {"head_seconds": limits.head_seconds, "answer_seconds": limits.body_seconds + limits.seconds + 30.0}
    return type("ServerConnection", (Connection,), {"most": most, **times})
