"""No client holds a connection for good, and where many try, one that has something to ask gets in."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from slimtune.errors import UserError
from slimtune.serve.connection import WAITING_OUTSIDE, Places, _home, places
from slimtune.serve.limits import Limits
from tests.serve.conftest import Served
from tests.serve.test_api import answer, until

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def opened(served: Served, own: str = "127.0.0.1") -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what isn't read fills it soon
    made.bind((own, 0))
    made.settimeout(20)
    made.connect((urlsplit(served.url).hostname, urlsplit(served.url).port))
    return made


@pytest.fixture(scope="module")
def strict(serving: Callable[..., Any]) -> Iterator[Served]:
    """A server with little time and few places."""
    with serving(Limits(head_seconds=1, connections=8)) as served:
        yield served


@pytest.fixture(scope="module")
def small(serving: Callable[..., Any]) -> Iterator[Served]:
    """A server with few places, and time."""
    with serving(Limits(head_seconds=60, connections=8)) as served:
        yield served


@contextlib.contextmanager
def many(served: Served, count: int, sent: bytes, own: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(opened(served, own)) for _ in range(count)]
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


def asks(connection: socket.socket) -> int:
    """The status of an answer, after which the connection stays."""
    connection.sendall(HEAD + b"\r\n")
    head = connection.recv(65536)
    while not head.endswith(b"}"):
        head += connection.recv(65536)
    return int(head.split()[1])


def waiting(served: Served) -> Counter[str | None]:
    return Counter(one._waits_for for one in served.web.server_state.connections)


def test_one_that_is_given_up_before_it_asked_is_told(small: Served) -> None:
    def is_in() -> bool:
        return late.getsockname() in {one.client for one in small.web.server_state.connections}

    with contextlib.closing(opened(small)) as late:
        assert until(is_in)
        with many(small, 20, b"GET"):
            assert until(lambda: not is_in())
            late.sendall(HEAD + b"\r\n")
            said = late.makefile("rb").read(200)
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 5\r\n" in said


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own count")
def test_the_system_keeps_many_that_wait_to_be_accepted(small: Served) -> None:
    said = small.web.servers[0].sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    assert struct.unpack_from("I", said, 28)[0] == min(WAITING_OUTSIDE, most)  # tcpi_sacked


def test_one_that_is_being_answered_keeps_its_place(small: Served) -> None:
    streams = [answer(small, stream=True) for _ in range(8)]
    try:
        for stream in streams:
            next(stream)
        assert until(lambda: waiting(small) == {None: 8})
        assert until(lambda: health(small) == 503)
    finally:
        for stream in streams:
            stream.close()
    assert until(lambda: health(small) == 200)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /half", POST + b"Content-Length: 50\r\n\r\n{"], ids=["nothing", "half a head", "half a body"]
)
def test_many_that_never_ask_cost_those_nothing_that_have_asked(small: Served, sent: bytes) -> None:
    with contextlib.closing(opened(small)) as kept:
        assert asks(kept) == 200
        with many(small, 100, sent) as half:
            assert until(lambda: waiting(small) == {"ask": 7, "ask again": 1})
            assert closed(half[0])
            assert asks(kept) == 200


def test_many_that_have_asked_cost_a_newcomer_nothing(small: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            assert asks(stack.enter_context(opened(small))) == 200
        quiet = [stack.enter_context(opened(small)) for _ in range(3)]
        assert until(lambda: waiting(small) == {"ask": 3, "ask again": 5})
        assert [asks(each) for each in quiet] == [200] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere loopback has one address")
def test_many_of_one_address_cost_another_nothing(small: Served) -> None:
    with contextlib.closing(opened(small)) as quiet, many(small, 100, b"GET", "127.0.0.2"):
        assert until(lambda: Counter(one._home for one in small.web.server_state.connections)["127.0.0.2"] == 7)
        assert asks(quiet) == 200


def test_who_does_not_take_its_answers_waits_too(small: Served) -> None:
    """Answers to many requests at once, more than the kernel holds for a client that reads none."""
    with many(small, 1, (HEAD.replace(b"/health", b"/") + b"\r\n") * 1000):
        assert until(lambda: waiting(small)["take its answer"] == 1, 60)
        assert health(small) == 200


def test_addresses_of_one_network_are_one_clients() -> None:
    assert _home(("2001:db8::1", 5)) == _home(("2001:db8:0:0:ffff::2", 6)) != _home(("2001:db8:0:1::1", 5))
    assert _home(("10.0.0.1", 5)) == _home(("10.0.0.1", 6)) != _home(("10.0.0.2", 5))
    assert _home(("fe80::1%eth0", 5)) == _home(("fe80::2%eth1", 5))
    assert _home(None) == ""


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
