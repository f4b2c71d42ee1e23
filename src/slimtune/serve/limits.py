"""What one server gives at most, and the count that keeps it to that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from slimtune.errors import UserError
from slimtune.serve.deadline import ending
from slimtune.serve.refusal import Refusal

__all__ = ["Gate", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Each is a promise about memory or time; what is over is refused with OpenAI's error format."""

    body_bytes: int = 262_144
    """Most bytes of a request's body."""
    prompt_tokens: int = 4096
    """Most tokens of a prompt."""
    output_tokens: int = 1024
    """Most tokens of a reply, and how many a request gets that names no number."""
    batch: int = 16
    """Most requests that are computed together, for each model."""
    waiting: int = 64
    """Most requests that wait beyond a full batch; over that, 503 with Retry-After."""
    seconds: float = 300.0
    """Most time for a request, from its first byte to the last one that its client takes."""
    body_seconds: float = 15.0
    """Most time for a request's body to come in."""
    head_seconds: float = 10.0
    """Most time for a request's head to come in, from the connection's beginning or the last answer's end."""
    connections: int = 512
    """Most connections at a time; over that, one that waits for its client is given up."""
    cache_tokens: int = 8192
    """Tokens whose keys and values are kept, for each model; never less than one longest request needs."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (0 if field.name == "waiting" else 1) <= value < math.inf:
                raise UserError(f"the limit {field.name} can't be {value}", rule="It is a positive number.")


class Gate:
    """Counts the requests inside, and lets no more in than fit the batch and the queue before it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.inside = 0
        self.closed = False
        """Whether the server ends: nobody is let in any more."""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within this, the request counts.

        Raises:
            Refusal: The room is full (503, with Retry-After).
        """
        self.check()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def check(self) -> None:
        """Refuse now what would be refused later.

        Raises:
            Refusal: The room is full, or closed (503, with Retry-After).
        """
        if self.closed:
            raise ending()
        if self.inside >= self.room:
            raise Refusal(503, "the server is busy: too many requests wait", "server_busy", retry_after=2)
