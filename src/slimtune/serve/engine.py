"""One model's engine: Transformers' continuous batching in a thread, asked from the event loop."""

from __future__ import annotations

import asyncio
import math
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from slimtune.serve.choice import Chances, Choice, Chooser
from slimtune.serve.guide import Guide
from slimtune.serve.limits import Limits
from slimtune.serve.paged import PAGE, make_manager
from slimtune.serve.refusal import Refusal
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling

__all__ = ["Engine", "Token", "stopped"]

# Prompts are computed in parts of this many tokens, among the others' next tokens: nobody waits for a long one.
_STEP_TOKENS = 256


@dataclass(frozen=True)
class Token:
    """One token of a reply."""

    id: int
    chances: Chances | None
    last: bool


class Engine:
    """Answers requests to one model, all that come at once in one batch.

    Memory is set aside at the start (keys and values of ``limits.cache_tokens`` tokens) and never grows; when it is
    full, the engine puts requests back and computes them again later. Without CUDA graphs and double buffering, for
    tokens are chosen in Python (:mod:`slimtune.serve.choice`).

    Args:
        opened: The model. The engine computes on a copy of its modules, which shares the tensors.
        limits: Batch size and cache.
        computing: What does the sums, one after another (why: :mod:`slimtune.serve.thread`).
    """

    def __init__(self, opened: Opened, limits: Limits, computing: Executor) -> None:
        self.opened = opened
        self._computing = computing
        self.longest_prompt = min(limits.prompt_tokens, opened.context - 1)
        longest = min(limits.prompt_tokens + limits.output_tokens, opened.context)
        # One page more than the longest request fills, for the engine takes whole pages.
        pages = math.ceil(max(limits.cache_tokens, longest) / PAGE) + 1
        _, self._manager = make_manager(opened, pages, max(_STEP_TOKENS, limits.batch), limits.batch)
        self._manager._create_batch_processor = self._created(self._manager._create_batch_processor)
        self._chooser = self._manager.logit_processor = Chooser()
        self._tickets: dict[str, _Ticket] = {}
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start the threads; called within the event loop that will ask."""
        self._manager.start()
        loop = asyncio.get_running_loop()
        self._reader = threading.Thread(target=self._read, args=(loop,), name="slimtune-replies")
        self._reader.start()

    async def stop(self) -> None:
        """End the threads; requests that are under way are failed."""
        await asyncio.to_thread(self._manager.stop, block=True, hard_stop=True)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.join)
        self._manager.destroy()

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return bool(self._manager.is_running())

    @property
    def held(self) -> int:
        """Requests that the engine computes or holds back at this moment."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0
        return len(processor.scheduler.active_requests) + len(processor.scheduler.waiting_requests)

    @asynccontextmanager
    async def reply(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        top_logprobs: int | None = None,
        guide: Guide | None = None,
    ) -> AsyncIterator[AsyncIterator[Token]]:
        """The tokens of one reply as they come; leaving the context ends the request, and its cost, at once.

        Raises:
            Refusal: The engine has stopped, or failed on this request.
        """
        identity = uuid.uuid4().hex
        ticket = self._tickets[identity] = _Ticket()
        choice = self._chooser.choices[identity] = Choice(sampling, top_logprobs, guide)
        try:
            taken = self._manager.add_request(
                list(prompt), request_id=identity, max_new_tokens=sampling.max_new_tokens, streaming=True
            )
            if taken is None:
                raise stopped()
            yield ticket.tokens(choice)
        finally:
            del self._tickets[identity]
            if not ticket.done:
                self._manager.cancel_request(identity)
            del self._chooser.choices[identity]

    def _created(self, create: Callable[[], Any]) -> Callable[[], Any]:
        """``create``, whose processor leaves all that touches the model or the cache to the thread that computes."""

        def created() -> Any:
            processor = self._computed(create)()
            processor.prepare_next_batch = self._computed(processor.prepare_next_batch)
            processor._generation_step = self._computed(processor._generation_step)
            return processor

        return created

    def _computed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: self._computing.submit(work, *args).result()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        for output in self._manager:
            loop.call_soon_threadsafe(self._deliver, output)
        loop.call_soon_threadsafe(self._fail_all)

    def _deliver(self, output: Any) -> None:
        # A request that has been left may still get a token that was under way.
        ticket = self._tickets.get(output.request_id)
        if ticket is not None:
            ticket.update(output.generated_tokens, output.is_finished(), output.error)

    def _fail_all(self) -> None:
        for ticket in self._tickets.values():
            ticket.update(ticket.ids, True, "the engine stopped")


class _Ticket:
    """What the engine has made for one request so far. A slow reader finds many tokens at once: nothing piles up."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.done = False
        self._error: str | None = None
        self._changed = asyncio.Event()

    def update(self, ids: list[int], done: bool, error: str | None) -> None:
        self.ids, self.done, self._error = ids, done, error
        self._changed.set()

    async def tokens(self, choice: Choice) -> AsyncIterator[Token]:
        given = 0
        while True:
            await self._changed.wait()
            self._changed.clear()
            ids, done = self.ids, self.done
            if choice.failed is not None:
                raise choice.failed
            if self._error is not None:
                raise stopped()
            for at in range(given, len(ids)):
                chances = None if choice.top_logprobs is None else choice.chances[at]
                yield Token(ids[at], chances, done and at == len(ids) - 1)
            given = len(ids)
            if done:
                return


def stopped() -> Refusal:
    """What a client is told when the engine has ended."""
    return Refusal(503, "the engine has stopped", "engine_stopped", retry_after=5)
