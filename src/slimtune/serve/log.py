"""A log that clients can't fill: what is said again and again is said once a minute, with a count."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Seldom", "seldom"]

_MOST_KINDS = 1000
_BEGINNING = 60


class Seldom(logging.Filter):
    """Lets a kind of record (its place in the code, and how it begins) through once in ``seconds``."""

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._kinds: dict[tuple[str, int, str], tuple[float, int]] = {}
        """When each was last let through, and how many were not since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this one is written; it then says how many like it were not."""
        kind = (record.pathname, record.lineno, str(record.msg)[:_BEGINNING])
        now = time.monotonic()
        last, left_out = self._kinds.get(kind, (-float("inf"), 0))
        if now - last < self._seconds:
            self._kinds[kind] = (last, left_out + 1)
            return False
        if len(self._kinds) >= _MOST_KINDS:
            self._kinds.clear()
        self._kinds[kind] = (now, 0)
        if left_out:
            record.msg, record.args = f"{record.getMessage()} (and {left_out:,} more like this before)", None
        return True


@contextmanager
def seldom() -> Iterator[None]:
    """Within this, the root logger's handlers write the same at most once a minute."""
    handlers, rare = logging.getLogger().handlers[:], Seldom()
    for handler in handlers:
        handler.addFilter(rare)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(rare)
