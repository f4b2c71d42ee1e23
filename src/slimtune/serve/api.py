"""The routes: OpenAI's chat completions, completions and models; health, metrics, and a page to try it."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from slimtune.errors import UserError
from slimtune.serve import protocol
from slimtune.serve.door import Door, read_body
from slimtune.serve.engine import Engine, Token
from slimtune.serve.in_turn import InTurn
from slimtune.serve.limits import Gate, Limits
from slimtune.serve.metrics import Metrics
from slimtune.serve.paged import why_not_paged
from slimtune.serve.refusal import Refusal
from slimtune.serve.reply import Part, parts
from slimtune.serve.shape import Chat, Completion, Shape, usage
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling

__all__ = ["Api"]

_log = logging.getLogger("slimtune.serve")
# The page is one file: nothing is loaded from anywhere, and only this server is asked.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)
T = TypeVar("T")


class Api:
    """The application over several models.

    Args:
        models: By the name that clients ask for.
        limits: What one request, and all together, may take.
        computing: What does the engines' sums, one after another.
        key: The API key, or None for a server that only this machine reaches.
    """

    def __init__(self, models: dict[str, Opened], limits: Limits, computing: Executor, key: str | None = None) -> None:
        self.limits = limits
        # All have one base, and adapters change nothing about how it is computed.
        reason = why_not_paged(next(iter(models.values())))
        kind = Engine if reason is None else InTurn
        self.slow = None if reason is None else f"requests are computed one by one, not together ({reason})"
        """What is slower than it could be, and why, in one line for people; None if nothing is."""
        self.engines: dict[str, Engine | InTurn] = {
            name: kind(opened, limits, computing) for name, opened in models.items()
        }
        self.gate = Gate(limits.batch + limits.waiting)
        self.metrics = Metrics()
        self.metrics.inside.set_function(lambda: self.gate.inside)
        for name, engine in self.engines.items():
            self.metrics.held.labels(name).set_function(partial(getattr, engine, "held"))
        self._started = int(time.time())
        # One thread renders prompts: tokenizers are not made to be used by several, and the event loop stays free.
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="slimtune-prompts")
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._counted(self.chat), methods=["POST"]),
                Route("/v1/completions", self._counted(self.completions), methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
                Route("/", self.page),
            ],
            middleware=[Middleware(Door, key=key)],
            exception_handlers={
                Refusal: _refused,
                HTTPException: _http_error,
                Exception: _fault,
            },
            lifespan=self._running,
        )

    @asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        for engine in self.engines.values():
            engine.start()
        try:
            yield
        finally:
            for engine in self.engines.values():
                await engine.stop()
            self._renderer.shutdown(cancel_futures=True)

    # -- the routes ---------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Any:
        """``POST /v1/chat/completions``."""
        asked = protocol.read(protocol.ChatRequest, await self._body(request), self.limits)
        engine = self._engine(asked.model)
        prompt = await self._rendered(
            lambda: engine.opened.prompt_ids(asked.messages, asked.shown_tools, asked.chat_template_kwargs)
        )
        return await self._answer(request, asked, engine, prompt, Chat)

    async def completions(self, request: Request) -> Any:
        """``POST /v1/completions``: the prompt as it is, without a template."""
        asked = protocol.read(protocol.CompletionRequest, await self._body(request), self.limits)
        engine = self._engine(asked.model)
        prompt = await self._rendered(lambda: _plain_ids(engine.opened, asked.prompt))
        return await self._answer(request, asked, engine, prompt, Completion)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.engines]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        name = request.path_params["name"]
        self._engine(name)
        return JSONResponse(self._described(name))

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 while every engine runs, else 503."""
        running = all(engine.running for engine in self.engines.values())
        content = {"status": "ok" if running else "stopped"}
        return JSONResponse(content, 200 if running else 503, {} if running else {"Retry-After": "5"})

    async def show_metrics(self, request: Request) -> Response:
        """``GET /metrics``, in Prometheus' text format."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        """``GET /``: a page to try it."""
        text = files("slimtune.serve").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    # -- one answer ---------------------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> bytes:
        body = await read_body(request, self.limits)
        self.gate.check()
        return body

    def _engine(self, name: str) -> Engine | InTurn:
        if name not in self.engines:
            has = ", ".join(self.engines)
            raise Refusal(404, f"no model is called {name!r:.200}; there are: {has}", "model_not_found", param="model")
        return self.engines[name]

    async def _rendered(self, render: Callable[[], list[int]]) -> list[int]:
        with self.gate.entered():
            try:
                return await asyncio.get_running_loop().run_in_executor(self._renderer, render)
            except UserError as error:
                raise Refusal(400, str(error), "invalid_prompt") from None

    async def _answer(
        self, request: Request, asked: protocol.Request, engine: Engine | InTurn, prompt: list[int], shape: type[Shape]
    ) -> Any:
        if len(prompt) > engine.longest_prompt:
            words = f"the prompt has {len(prompt)} tokens; this server takes {engine.longest_prompt}"
            raise Refusal(400, words, "context_length_exceeded")
        reply = _Reply(self, asked, engine, prompt, shape)
        if asked.stream:
            self.gate.check()
            return _Stream(reply, self)
        with self.gate.entered():
            return JSONResponse(await while_connected(request.receive, reply.whole()))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "slimtune"}

    def _counted(self, handler: Callable[[Request], Coroutine[Any, Any, Any]]) -> Callable[[Request], Any]:
        async def counted(request: Request) -> Any:
            status = 500
            try:
                response = await handler(request)
                status = response.status_code
                return response
            except Refusal as refusal:
                status = refusal.status
                raise
            except ClientDisconnect:
                self.metrics.left.inc()
                status = 499
                return Response(status_code=status)
            finally:
                self.metrics.requests.labels(request.url.path, status).inc()

        return counted


class _Reply:
    """One request on its way to an answer."""

    def __init__(
        self, api: Api, asked: protocol.Request, engine: Engine | InTurn, prompt: list[int], shape: type[Shape]
    ) -> None:
        self.api, self.asked, self.engine, self.prompt = api, asked, engine, prompt
        self.shape = shape(asked.model, asked.wanted_logprobs is not None, self._spell)
        room = engine.opened.context - len(prompt)
        _, wanted = asked.wanted_tokens
        self.sampling = Sampling(
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_new_tokens=min(wanted or api.limits.output_tokens, room),
            seed=secrets.randbits(31) if asked.seed is None else asked.seed % 2**31,
        )

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The reply in parts, timed and counted, within the time that a request has."""
        metrics, name = self.api.metrics, self.asked.model
        started, first = time.perf_counter(), True
        metrics.prompt_tokens.labels(name).inc(len(self.prompt))
        made = parts(self.engine, self.prompt, self.sampling, self.asked.stops, self.asked.wanted_logprobs)
        async with aclosing(made):
            async for part in made:
                if first:
                    metrics.first_token.labels(name).observe(time.perf_counter() - started)
                    first = False
                metrics.reply_tokens.labels(name).inc(len(part.tokens))
                yield part
        metrics.seconds.labels(name).observe(time.perf_counter() - started)

    async def whole(self) -> dict[str, Any]:
        """The answer at once.

        Raises:
            Refusal: It took too long, or the engine stopped.
        """
        text: list[str] = []
        tokens: list[Token] = []
        finish: str | None = None
        try:
            async with asyncio.timeout(self.api.limits.seconds), aclosing(self.parts()) as made:
                async for part in made:
                    text.append(part.text)
                    tokens += part.tokens
                    finish = part.finish
        except TimeoutError:
            raise _too_slow(self.api.limits) from None
        return self.shape.whole("".join(text), tokens, finish, usage(len(self.prompt), len(tokens)))

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as a stream's chunks."""
        for chunk in self.shape.opening():
            yield chunk
        count = 0
        async with aclosing(self.parts()) as made:
            async for part in made:
                count += len(part.tokens)
                yield self.shape.chunk(part)
        if self.asked.includes_usage:
            yield self.shape.last(usage(len(self.prompt), count))

    def _spell(self, token: int) -> tuple[str, list[int]]:
        text = str(self.engine.opened.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return text, list(text.encode())


class _Stream:
    """A reply as server-sent events. A client that goes away, or reads too slowly, ends it where it is."""

    status_code = 200

    def __init__(self, reply: _Reply, api: Api) -> None:
        self._reply, self._api = reply, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._api.gate.entered():
            try:
                async with asyncio.timeout(self._api.limits.seconds):
                    await while_connected(receive, self._send(send))
            except (TimeoutError, ClientDisconnect, OSError):
                # Nobody is there to tell. The connection is closed without the stream's end.
                self._api.metrics.left.inc()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            async with aclosing(self._reply.events()) as events:
                async for chunk in events:
                    await event(json.dumps(chunk, ensure_ascii=False))
            await event("[DONE]")
        except Refusal as refusal:
            await event(json.dumps(refusal.content()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client goes away.

    Raises:
        ClientDisconnect: It went away.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _plain_ids(opened: Opened, prompt: Any) -> list[int]:
    """A completion's prompt as ids: encoded by the tokenizer with its own additions, or given as ids."""
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        highest = len(opened.tokenizer) - 1
        if not all(0 <= token <= highest for token in prompt):
            raise UserError(f"a token id of the prompt is not between 0 and {highest}")
        return list(prompt)
    text = prompt if isinstance(prompt, str) else prompt[0]
    ids: list[int] = opened.tokenizer(text)["input_ids"]
    if not ids:
        raise UserError("the prompt is empty")
    return ids


def _too_slow(limits: Limits) -> Refusal:
    return Refusal(503, f"the reply took longer than {limits.seconds:g} s", "timeout", retry_after=5)


async def _refused(request: Request, error: Any) -> Response:
    response: Response = error.response()
    return response


async def _http_error(request: Request, error: Any) -> Response:
    return Refusal(error.status_code, str(error.detail).lower(), "http_error").response()


async def _fault(request: Request, error: Exception) -> Response:
    _log.error("a fault of slimtune's own", exc_info=error)
    return Refusal(500, "a fault of the server's own; its log says more", "internal_error").response()
