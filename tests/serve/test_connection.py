"""No client holds a connection for good, and where many try, one that has something to ask gets in."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from slimtune.errors import UserError
from slimtune.serve.connection import Places, places
from slimtune.serve.limits import Limits
from tests.serve.conftest import Served
from tests.serve.test_api import until

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def opened(served: Served) -> socket.socket:
    made = socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=20)
    made.settimeout(20)
    return made


@pytest.fixture(scope="module")
def strict(serving: Callable[..., Any]) -> Iterator[Served]:
    """A server with little time and few places."""
    with serving(Limits(head_seconds=1, connections=8)) as served:
        yield served


@contextlib.contextmanager
def many(served: Served, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(opened(served)) for _ in range(count)]
        for each in made:
            each.sendall(sent)
        yield made


def closed(connection: socket.socket) -> bool:
    """Waits until the server ends the connection, and says that it did."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def health(served: Served) -> int:
    with opened(served) as connection:
        connection.sendall(HEAD + b"Connection: close\r\n\r\n")
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET", HEAD + b"X-A: b", HEAD + b"\r\n", HEAD + b"Content-Length: 5\r\n\r\nab", HEAD + b"\r\nGET / HT"],
    ids=[
        "nothing",
        "a word",
        "half a head",
        "idle after an answer",
        "no body behind an answer",
        "half of a second one",
    ],
)
def test_a_client_that_goes_quiet_is_let_go(strict: Served, sent: bytes) -> None:
    with opened(strict) as connection:
        connection.sendall(sent)
        assert closed(connection)


def test_one_that_sends_a_letter_at_a_time_is_let_go(strict: Served) -> None:
    with opened(strict) as connection:
        connection.settimeout(0.2)
        ended = False
        for _ in range(100):
            try:
                connection.sendall(b"X")
                ended = connection.recv(10) == b""
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                ended = True
            if ended:
                break
        assert ended


def test_the_newcomer_gets_the_place_of_the_one_that_waited_longest(strict: Served) -> None:
    with many(strict, 100, b"GET /half") as half:
        assert [health(strict) for _ in range(5)] == [200] * 5
        assert len(strict.web.server_state.connections) <= 8
        assert closed(half[0])


def test_one_that_is_being_answered_keeps_its_place(strict: Served) -> None:
    assert until(lambda: not strict.web.server_state.connections)
    body = HEAD.replace(b"GET /health", b"POST /v1/completions")
    with many(strict, 8, body + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"):
        assert until(lambda: sum(one._answering is not None for one in strict.web.server_state.connections) == 8)
        assert until(lambda: health(strict) == 503)
    assert until(lambda: health(strict) == 200)


def test_as_many_connections_as_descriptors_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def allowed(files: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (files, files))

    allowed(resource.RLIM_INFINITY)
    assert places(Limits()) == Places(512, 128)
    allowed(100_000)
    assert places(Limits()) == Places(512, 128)
    allowed(300)
    made = places(Limits())
    assert 8 <= made.connections < made.connections + 3 * made.backlog < 300
    allowed(40)
    with pytest.raises(UserError, match="40 files"):
        places(Limits())
