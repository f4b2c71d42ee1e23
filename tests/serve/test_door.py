"""The key is asked for by the path of the request line alone; browsers are told what they may do."""

from __future__ import annotations

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from slimtune.serve.door import Door
from tests.serve.conftest import KEY


def through(path: bytes, headers: list[tuple[bytes, bytes]], decoded: str | None = None) -> int:
    """The status that the door gives, 299 if it let the request in. No web server is between."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})

    said: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        said.append(message)

    scope = {
        "type": "http", "method": "GET", "scheme": "http", "path": decoded or path.decode(), "raw_path": path,
        "query_string": b"", "root_path": "", "headers": headers, "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    asyncio.run(Door(inner, KEY)(scope, None, send))  # type: ignore[arg-type]
    assert (b"x-content-type-options", b"nosniff") in said[0]["headers"]
    return int(said[0]["status"])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"x/health?")],
        [(b"host", b"localhost/health#")],
        [(b"host", b"")],
        [(b"x-forwarded-prefix", b"/health")],
        [(b"x-original-url", b"/health")],
    ],
)
def test_no_header_opens_a_path(headers: list[tuple[bytes, bytes]]) -> None:
    assert through(b"/v1/models", headers) == 401
    assert through(b"/metrics", headers) == 401
    assert through(b"/health", headers) == 299
    assert through(b"/", headers) == 299
    assert through(b"/v1/models", [*headers, (b"authorization", b"Bearer " + KEY.encode())]) == 299


def test_another_spelling_of_an_open_path_is_closed() -> None:
    assert through(b"/%68ealth", [], "/health") == 401
    assert through(b"//health", []) == 401
    assert through(b"/health/../v1/models", []) == 401
    assert through(b"http://localhost/health", []) == 401


def test_over_a_connection_as_well(serving: Any) -> None:
    with serving(key=KEY) as served:
        for host in (b"x/health?", b"localhost/health#", b"localhost:8000/health?"):
            with socket.create_connection(urlsplit(served.url).netloc.split(":")) as connection:
                connection.sendall(b"GET /metrics HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n")
                assert connection.makefile("rb").readline().split()[1] in (b"400", b"401")
