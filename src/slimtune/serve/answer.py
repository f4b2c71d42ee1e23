"""One request's answer: computed within its time, and sent whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from slimtune.data.calls import Call
from slimtune.serve import protocol
from slimtune.serve.connected import while_connected
from slimtune.serve.deadline import Deadlines
from slimtune.serve.engine import Engine, Token
from slimtune.serve.guide import Guide
from slimtune.serve.in_turn import InTurn
from slimtune.serve.limits import Gate, Limits
from slimtune.serve.metrics import Metrics
from slimtune.serve.refusal import Refusal
from slimtune.serve.reply import Part, parts
from slimtune.serve.shape import Shape, usage
from slimtune.serve.spelling import Spelling
from slimtune.serve.tools import CallText
from slimtune.use.sampling import Sampling

__all__ = ["Answer", "Stream"]

T = TypeVar("T")
# A client that is told why its stream ends has this long to take it.
_LAST_WORDS_SECONDS = 0.5


class Answer:
    """One request on its way to an answer.

    Args:
        asked: What was asked for.
        prompt: As ids.
        engine: What computes it.
        shape: How its answer looks.
        limits: The server's.
        metrics: The server's.
        calls: Takes tool calls out of its text, where there may be any.
        guide: What it may say at all.
    """

    def __init__(
        self,
        asked: protocol.Request,
        prompt: list[int],
        engine: Engine | InTurn,
        shape: type[Shape],
        limits: Limits,
        metrics: Metrics,
        *,
        calls: CallText | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.calls, self.guide = calls, guide
        self.asked, self.engine, self.prompt, self.metrics = asked, engine, prompt, metrics
        spelling = Spelling(engine.opened.tokenizer, engine.opened.stop_ids[0])
        self.shape = shape(asked.model, asked.wanted_logprobs is not None, spelling)
        room = engine.opened.context - len(prompt)
        _, wanted = asked.wanted_tokens
        self.sampling = Sampling(
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_new_tokens=min(wanted or limits.output_tokens, room),
            seed=secrets.randbits(31) if asked.seed is None else asked.seed % 2**31,
        )

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The reply in parts, timed and counted."""
        metrics, name = self.metrics, self.asked.model
        started, first = time.perf_counter(), True
        metrics.prompt_tokens.labels(name).inc(len(self.prompt))
        made = parts(
            self.engine,
            self.prompt,
            self.sampling,
            self.asked.stops,
            self.asked.wanted_logprobs,
            calls=self.calls,
            guide=self.guide,
        )
        async with aclosing(made):
            async for part in made:
                if first:
                    metrics.first_token.labels(name).observe(time.perf_counter() - started)
                    first = False
                metrics.reply_tokens.labels(name).inc(len(part.tokens))
                yield part
        metrics.seconds.labels(name).observe(time.perf_counter() - started)

    async def whole(self, deadlines: Deadlines) -> dict[str, Any]:
        """The answer at once.

        Raises:
            Refusal: It took too long, or the engine stopped or failed on it.
        """
        text: list[str] = []
        tokens: list[Token] = []
        calls: list[Call] = []
        finish: str | None = None
        async with deadlines.within(), aclosing(self.parts()) as made:
            async for part in made:
                text.append(part.text)
                tokens += part.tokens
                calls += part.calls
                finish = part.finish
        return self.shape.whole("".join(text), tokens, finish, usage(len(self.prompt), len(tokens)), calls)

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


class Stream:
    """An answer as server-sent events. A client that goes away ends it where it is; one that reads too slowly, when its
    time is over. Whatever else ends it is its last event but one, before ``[DONE]``.

    Args:
        answer: The answer.
        gate: Where it counts.
        deadlines: Its time.
    """

    status_code = 200

    def __init__(self, answer: Answer, gate: Gate, deadlines: Deadlines) -> None:
        self._answer, self._gate, self._deadlines = answer, gate, deadlines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._gate.entered():
            try:
                await while_connected(receive, self._send(send))
            except (TimeoutError, ClientDisconnect, OSError):
                # Nobody is there to tell. The connection is closed without the stream's end.
                self._answer.metrics.left.inc()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(data: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        try:
            async with self._deadlines.within(), aclosing(self._answer.events()) as events:
                async for chunk in events:
                    await event(json.dumps(chunk, ensure_ascii=False))
                await event("[DONE]", more=False)
        except Refusal as refusal:
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await event(json.dumps(refusal.content()))
                await event("[DONE]", more=False)
