"""What is settled before a request is read: who may ask, from where, and how much may come in."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimtune.serve.address import is_loopback
from slimtune.serve.limits import Limits
from slimtune.serve.refusal import Refusal

__all__ = ["Door", "read_body"]

_OPEN = (b"/", b"/health")
# What is said is what it is said to be, whatever it looks like to a browser.
_HEADERS = ((b"x-content-type-options", b"nosniff"),)
# A body over the limit is read up to this many times the limit before it is refused: a client that is still sending
# would see its connection break, not the answer.
_DISCARDED = 32


class Door:
    """Middleware: the API key where there is one, the Host header where there is none, and headers for browsers.

    Without a key, only this machine may ask. Web pages in its browser are kept out: another site's page can't send
    ``application/json`` without a preflight, which nothing here answers, and a name that was rebound to this machine
    is seen in the Host header.

    What is open is known by the path as it came in with the request line, byte for byte: nothing that is made from
    headers decides.

    Args:
        app: The application.
        key: The API key, or None.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it (401, 403)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        refusal = self._refusal(scope)
        await (self.app if refusal is None else refusal.response())(scope, receive, sent)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        if self.key is None:
            if not is_loopback(_host(headers.get("host", ""))):
                return Refusal(403, "without an API key, only localhost may ask", "wrong_host")
            return None
        if scope["raw_path"] in _OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Compared as a whole whatever the scheme, in a time that doesn't tell how much of it was right.
        if hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.key) and scheme.lower() == "bearer":
            return None
        return Refusal(401, "the API key is missing or wrong", "invalid_api_key")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request.

    Raises:
        Refusal: It is of another kind (415), over the limit (413), or too slow (408).
        starlette.requests.ClientDisconnect: The client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the body must be application/json", "unsupported_media_type")
    size, kept = 0, bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.body_bytes:
                    kept += chunk
                elif size > limits.body_bytes * _DISCARDED:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body took longer than {limits.body_seconds:g} s", "timeout") from None
    if size > limits.body_bytes:
        raise Refusal(413, f"the body is larger than {limits.body_bytes:,} bytes", "body_too_large")
    return bytes(kept)


def _host(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
