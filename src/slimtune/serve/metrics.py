"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """A registry of its own, so that a process which uses slimtune as a library keeps its metrics apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "slimtune_requests", "Requests that were answered, by path and status.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.left = Counter("slimtune_requests_left", "Clients that went away before the end.", registry=self.registry)
        self.prompt_tokens = Counter("slimtune_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.reply_tokens = Counter("slimtune_reply_tokens", "Tokens of replies.", ["model"], registry=self.registry)
        self.first_token = Histogram(
            "slimtune_first_token_seconds", "From the request to the first token of its reply.", ["model"],
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self.inside = Gauge("slimtune_requests_inside", "Requests computed or waiting.", registry=self.registry)
        self.held = Gauge(
            "slimtune_engine_requests", "Requests that an engine holds.", ["model"], registry=self.registry
        )
        self.seconds = Histogram(
            "slimtune_reply_seconds", "From the request to the last token of its reply.", ["model"],
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
