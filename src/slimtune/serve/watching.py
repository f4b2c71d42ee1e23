"""The routes of the live page: the page, its events, and the request to stop. On loopback, a token in the address.

The folders are read in one thread, once for all who watch, and as seldom as that is slow: it takes a tenth of a core at
most. A run is stopped by the file in its folder (:func:`slimtune.run.lock.ask_to_stop`); no process is signalled.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from slimtune.errors import SlimtuneError
from slimtune.run.live import HEARS, LiveRun
from slimtune.run.live_page import language, page, pieces
from slimtune.run.lock import ask_to_stop
from slimtune.run.statement import Lang
from slimtune.serve.connected import while_connected
from slimtune.serve.deadline import Deadlines
from slimtune.serve.door import Door, read_body
from slimtune.serve.limits import Gate, Limits
from slimtune.serve.refusal import Refusal

__all__ = ["Watching"]

LIMITS = Limits(body_bytes=1024, body_seconds=5.0, seconds=300.0, connections=64)
"""A stream of events ends after five minutes, and the page opens another."""
STREAMS = 32
"""Pages that are served at a time."""
_TICK = 1.0
_SHARE = 9.0
"""From one look to the next: a second, or this many times what the last one took."""
_LAST_WORDS_SECONDS = 0.5


class Watching:
    """The application over the runs that are watched.

    Args:
        runs: Them.
        token: What the address holds.
        tell: Takes a line for the terminal.
    """

    def __init__(self, runs: Sequence[LiveRun], token: str, tell: Callable[[str], None]) -> None:
        self.runs, self._token, self._tell = list(runs), token.encode(), tell
        self.limits = LIMITS
        self.fault: SlimtuneError | None = None
        """Why it can't go on, once it can't."""
        self.gate = Gate(STREAMS)
        self.deadlines = Deadlines(LIMITS.seconds)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="slimtune-watch")
        self._looks = 1  # of those that saw something new
        self._looked = asyncio.Condition()
        self._shown: dict[Lang, tuple[int, dict[str, str]]] = {}
        self._gone: set[str] = set()
        self._looking: asyncio.Task[None] | None = None
        self.app = Starlette(
            routes=[
                Route("/{token}/", self.page),
                Route("/{token}/events", self.events),
                Route("/{token}/stop", self.stop, methods=["POST"]),
            ],
            middleware=[Middleware(Door, key=None)],
            exception_handlers={Refusal: _refused},
            lifespan=self._running,
        )

    @asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        await self._look()
        self._looking = asyncio.ensure_future(self._look_on())
        try:
            yield
        finally:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
            self._reader.shutdown(cancel_futures=True)

    async def _look_on(self) -> None:
        pause = _TICK
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            await self._look()
            pause = max(_TICK, _SHARE * (time.monotonic() - began))

    async def _look(self) -> None:
        """Read what is new, and draw it in the languages that are being watched in."""

        def look() -> None:
            self._looks += sum([run.look() for run in self.runs])
            for lang, (shown, _) in list(self._shown.items()):
                if shown < self._looks and self.gate.inside:
                    self._shown[lang] = (self._looks, pieces(self.runs, lang))

        await asyncio.get_running_loop().run_in_executor(self._reader, look)
        for run in self.runs:
            if run.state == "gone" and run.name not in self._gone:
                self._tell(f"{run.path} is gone")
            (self._gone.add if run.state == "gone" else self._gone.discard)(run.name)
        async with self._looked:
            self._looked.notify_all()

    def check(self) -> None:
        """Look whether it still reads; why it doesn't is left in :attr:`fault`."""
        if self._looking is not None and self._looking.done() and not self._looking.cancelled():
            self.fault = SlimtuneError(f"the live page can't go on: {self._looking.exception()!r}")

    async def finish(self, seconds: float) -> None:
        """Show what is there last, and tell the pages that this was it."""
        self.gate.closed = True
        await self._look()
        self.deadlines.end()
        end = time.monotonic() + seconds
        while self.gate.inside and time.monotonic() < end:
            await asyncio.sleep(0.02)

    # -- the routes ---------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """``GET /TOKEN/``."""
        self._check(request)
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; "
            "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        )
        text = page(self.runs, _language(request), nonce)
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return HTMLResponse(text, headers=headers)

    async def events(self, request: Request) -> Any:
        """``GET /TOKEN/events``: the page's pieces, all of them first, then those that change."""
        self._check(request)
        self.gate.check()
        return _Events(self, _language(request))

    async def stop(self, request: Request) -> Response:
        """``POST /TOKEN/stop`` with ``{"run": number}``."""
        self._check(request)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise Refusal(403, "another site's page may not stop a run", "wrong_origin")
        run = self._run_of(await read_body(request, self.limits))
        await self._look()
        if run.state not in HEARS:
            raise Refusal(409, "this run has no step left to stop after", "not_running")
        try:
            ask_to_stop(run.path)
        except OSError as error:
            raise Refusal(409, f"its folder can't be written: {error.strerror}", "not_writable") from None
        await self._look()
        return JSONResponse({"state": run.state})

    def _check(self, request: Request) -> None:
        """Let in only who has the token."""
        if not hmac.compare_digest(request.path_params["token"].encode("utf-8", "replace"), self._token):
            raise Refusal(404, "this address isn't the one that was printed", "wrong_token")

    def _run_of(self, body: bytes) -> LiveRun:
        try:
            asked = json.loads(body)
            number = asked["run"]
            if type(number) is int and 0 <= number < len(self.runs):
                return self.runs[number]
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise Refusal(400, 'the body is {"run": number}', "invalid_body")

    async def shown(self, lang: Lang, after: int) -> tuple[int, dict[str, str]]:
        """The pieces as of a look after ``after``, and which that was."""
        self._shown.setdefault(lang, (0, {}))
        if not after:  # a new page: what is kept may be from when nobody watched
            await self._look()
        async with self._looked:
            await self._looked.wait_for(lambda: self._shown[lang][0] > after)
        return self._shown[lang]


class _Events:
    """A stream of a page's pieces. It ends when its client goes away, when its time is over (the page opens another),
    or with the server, which it says."""

    def __init__(self, watching: Watching, lang: Lang) -> None:
        self._watching, self._lang = watching, lang

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = self._watching
        # Where nobody is there to tell, nothing is told.
        with watching.gate.entered(), suppress(TimeoutError, ClientDisconnect, OSError):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"{text}\n\n".encode(), "more_body": more})

        sent: dict[str, str] = {}
        look = 0
        try:
            async with self._watching.deadlines.within():
                await event("retry: 1000")
                while True:
                    look, shown = await self._watching.shown(self._lang, look)
                    if changed := {name: text for name, text in shown.items() if sent.get(name) != text}:
                        await event(f"data: {json.dumps(changed, ensure_ascii=False)}")
                        sent |= changed
        except Refusal:
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                if not self._watching.deadlines.over:
                    await event(": the page opens another", more=False)
                    return
                _, shown = self._watching._shown.get(self._lang, (0, sent))
                changed = {name: text for name, text in shown.items() if sent.get(name) != text}
                await event(f"data: {json.dumps(changed, ensure_ascii=False)}")
                await event("event: end\ndata: {}", more=False)


def _language(request: Request) -> Lang:
    return language(request.query_params.get("lang"), request.headers.get("accept-language", ""))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()
