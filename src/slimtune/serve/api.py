"""The routes: OpenAI's chat completions, completions and models; health, metrics, and a page to try it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from slimtune.errors import SlimtuneError, UserError
from slimtune.serve import protocol
from slimtune.serve.answer import Answer, Stream
from slimtune.serve.connected import while_connected
from slimtune.serve.deadline import Deadlines
from slimtune.serve.door import Door, read_body
from slimtune.serve.engine import Engine
from slimtune.serve.guide import Guide, Guides
from slimtune.serve.in_turn import InTurn
from slimtune.serve.installed import TRIED
from slimtune.serve.limits import Gate, Limits
from slimtune.serve.metrics import Metrics
from slimtune.serve.paged import why_not_paged
from slimtune.serve.refusal import Refusal
from slimtune.serve.shape import Chat, Completion, Shape
from slimtune.serve.tools import CallText, Forms
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling
from slimtune.use.way import FAULTS

__all__ = ["Api"]

_log = logging.getLogger("slimtune.serve")
# The page is one file: nothing is loaded from anywhere, and only this server is asked.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
T = TypeVar("T")
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# How often it is looked whether the requests under way are through, when the server ends.
_GLANCE_SECONDS = 0.05


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
        reason = why_not_paged(next(iter(models.values())), limits.prompt_tokens + limits.output_tokens)
        kind = Engine if reason is None else InTurn
        self.slow = None if reason is None else f"requests are computed one by one, not together ({reason})"
        """What is slower than it could be, and why, in one line for people; None if nothing is."""
        self.engines: dict[str, Engine | InTurn] = {
            name: kind(opened, limits, computing) for name, opened in models.items()
        }
        self._forms = {name: Forms(opened) for name, opened in models.items()}
        self._guides = {name: Guides(opened) for name, opened in models.items()}
        self.gate = Gate(limits.batch + limits.waiting)
        self.deadlines = Deadlines(limits.seconds)
        self.fault: SlimtuneError | None = None
        """Why it can't go on, once it can't."""
        self.metrics = Metrics()
        self.metrics.inside.set_function(lambda: self.gate.inside)
        for name, engine in self.engines.items():
            self.metrics.held.labels(name).set_function(partial(getattr, engine, "held"))
        self._started = int(time.time())
        # One thread renders prompts: tokenizers are not made to be used by several, and the event loop stays free.
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="slimtune-prompts")
        self.app = Starlette(
            routes=[
                Route(_CHAT, self._counted(_CHAT, self.chat), methods=["POST"]),
                Route(_COMPLETIONS, self._counted(_COMPLETIONS, self.completions), methods=["POST"]),
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
            await self.greet()
            yield
        finally:
            for engine in self.engines.values():
                await engine.stop()
            self._renderer.shutdown(cancel_futures=True)

    async def greet(self) -> None:
        """Have every engine say one token, as it would to a client: what can't answer should never be asked.

        What goes wrong is left in :attr:`fault`.
        """
        for name, engine in self.engines.items():
            try:
                async with engine.reply([engine.opened.pad_id], Sampling(max_new_tokens=1)) as tokens:
                    async for _ in tokens:
                        pass
            except (Refusal, *FAULTS) as error:
                self.fault = SlimtuneError(
                    f"{name} can't be served: {error}",
                    rule=f"It was tried with one token, by Transformers {version('transformers')}; "
                    f"tried with {TRIED['transformers']} were others.",
                    way_out="--log FILE writes down what went wrong.",
                )
                return

    def check(self) -> None:
        """Look whether every engine still runs; what doesn't is left in :attr:`fault`."""
        for name, engine in self.engines.items():
            if self.fault is None and not engine.running:
                self.fault = SlimtuneError(
                    f"the engine of {name} has stopped",
                    rule="A server that can't answer ends, so that whatever watches over it starts it anew.",
                    way_out="--log FILE writes down what went wrong.",
                )

    async def finish(self, seconds: float) -> None:
        """Let nobody in any more, and the requests under way end within ``seconds``; then end them."""
        self.gate.closed = True
        end = time.monotonic() + seconds
        while self.gate.inside and self.fault is None and time.monotonic() < end:
            await asyncio.sleep(_GLANCE_SECONDS)
        self.deadlines.end()

    # -- the routes ---------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Any:
        """``POST /v1/chat/completions``."""
        asked = protocol.read(protocol.ChatRequest, await self._body(request), self.limits)
        engine = self._engine(asked.model)
        prompt, calls, guide = await self._rendered(request, partial(self._prepared, asked, engine.opened))
        return await self._answer(request, asked, engine, prompt, Chat, calls=calls, guide=guide)

    async def completions(self, request: Request) -> Any:
        """``POST /v1/completions``: the prompt as it is, without a template."""
        asked = protocol.read(protocol.CompletionRequest, await self._body(request), self.limits)
        engine = self._engine(asked.model)
        prompt = await self._rendered(request, partial(_plain_ids, engine.opened, asked.prompt))
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

    def _prepared(self, asked: protocol.ChatRequest, opened: Opened) -> tuple[list[int], CallText | None, Guide | None]:
        """The prompt, and how the reply is to be read and guided."""
        calls = guide = None
        if asked.shown_tools is not None:
            form = self._forms[asked.model].find(asked.chat_template_kwargs)
            guides = self._guides[asked.model]
            calls = CallText(
                form,
                asked.shown_tools,
                self._forms[asked.model].marks(form),
                most=1 if asked.one_call else None,
                checks={name: guides.check(schema) for name, schema in asked.strict_schemas.items()},
            )
            if asked.must_call is not None:
                guide = guides.make_call(form.frame(), asked.must_call, several=not asked.one_call)
        if (schema := asked.wanted_schema) is not None:
            guide = self._guides[asked.model].make(schema)
        return opened.prompt_ids(asked.turns, asked.shown_tools, asked.chat_template_kwargs), calls, guide

    async def _rendered(self, request: Request, render: Callable[[], T]) -> T:
        """What ``render`` gives, once its turn comes; for a client that is gone by then it isn't done."""

        async def rendered() -> T:
            async with self.deadlines.within():
                return await asyncio.get_running_loop().run_in_executor(self._renderer, render)

        with self.gate.entered():
            try:
                return await while_connected(request.receive, rendered())
            except UserError as error:
                raise Refusal(400, str(error), "invalid_prompt") from None

    async def _answer(
        self,
        request: Request,
        asked: protocol.Request,
        engine: Engine | InTurn,
        prompt: list[int],
        shape: type[Shape],
        *,
        calls: CallText | None = None,
        guide: Guide | None = None,
    ) -> Any:
        if len(prompt) > engine.longest_prompt:
            words = f"the prompt has {len(prompt)} tokens; this server takes {engine.longest_prompt}"
            raise Refusal(400, words, "context_length_exceeded")
        rows = engine.opened.model.get_input_embeddings().weight.shape[0]
        if max(prompt) >= rows:
            words = f"a token of the prompt is {max(prompt)}; the model has {rows}"
            raise Refusal(400, words, "invalid_prompt")
        answer = Answer(asked, prompt, engine, shape, self.limits, self.metrics, calls=calls, guide=guide)
        if asked.stream:
            self.gate.check()
            return Stream(answer, self.gate, self.deadlines)
        with self.gate.entered():
            return JSONResponse(await while_connected(request.receive, answer.whole(self.deadlines)))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "slimtune"}

    def _counted(self, path: str, handler: Callable[[Request], Coroutine[Any, Any, Any]]) -> Callable[[Request], Any]:
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
                self.metrics.requests.labels(path, status).inc()

        return counted


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


async def _refused(request: Request, error: Any) -> Response:
    response: Response = error.response()
    return response


async def _http_error(request: Request, error: Any) -> Response:
    return Refusal(error.status_code, str(error.detail).lower(), "http_error").response()


async def _fault(request: Request, error: Exception) -> Response:
    _log.error("a fault of slimtune's own", exc_info=error)
    return Refusal(500, "a fault of the server's own; its log says more", "internal_error").response()
