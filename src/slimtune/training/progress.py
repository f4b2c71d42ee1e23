"""What the trainer tells the outside while it runs: one record a logged step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["MetricsCallback"]


class MetricsCallback(TrainerCallback):
    """Turns the Trainer's logs into records with speed, time left and memory.

    A record has ``step``, ``steps``, ``epoch``, ``loss``, ``grad_norm``, ``learning_rate``, ``tokens_per_second``
    (all tokens that went through the model, padding left out), ``seconds`` since the start, ``seconds_left`` and
    ``memory_bytes`` (peak allocated on the GPU; resident on a CPU).
    """

    def __init__(self, tokens_in_step: Callable[[int], int], *sinks: Callable[[dict[str, Any]], None]) -> None:
        self.tokens_in_step = tokens_in_step
        self.sinks = sinks
        self.started = self.last_time = time.monotonic()
        self.last_step = 0
        self.first_step = 0
        self.paused = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; a resumed run counts from where it is."""
        self.started = self.last_time = time.monotonic()
        self.last_step = self.first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass one record on to every sink."""
        if not logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        record: dict[str, Any] = {"step": state.global_step, "steps": state.max_steps}
        record |= {key: _number(value) for key, value in logs.items()}
        if "loss" in logs:
            steps, elapsed = state.global_step - self.last_step, now - self.last_time
            tokens = sum(self.tokens_in_step(step) for step in range(self.last_step, state.global_step))
            record["tokens_per_second"] = round(tokens / elapsed, 1) if elapsed > 0 else 0.0
            done = state.global_step - self.first_step
            record["seconds"] = round(now - self.started, 3)
            record["step_seconds"] = round(elapsed / max(1, steps), 4)
            record["seconds_left"] = round(
                (now - self.started) / max(1, done) * (state.max_steps - state.global_step), 1
            )
            record["memory_bytes"] = memory_bytes()
            self.last_time, self.last_step = now, state.global_step
        for sink in self.sinks:
            sink(record)


def memory_bytes() -> int:
    """Peak bytes allocated on the GPU, or the process's resident bytes on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) else value
