"""When held-out prompts are answered in the course of a run, and what that may cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.base.computes import CANT_TAKE
from slimtune.errors import UserError
from slimtune.training.plain import one_dtype
from slimtune.training.progress import MetricsCallback
from slimtune.training.resumable import Safety

__all__ = ["SamplesCallback"]

SECONDS = 5.0
"""Most time for one evaluation's replies."""
SHARE = 0.05
"""Of the time since the training's beginning: all replies but the first and the last ones take no more. Of several
ranks one answers and the others wait: it is their part of it."""

Answer = Callable[[Any, float, Callable[[], bool]], list[dict[str, str]] | None]


class SamplesCallback(TrainerCallback):
    """Has prompts answered after an evaluation, where the run has time for it; always at the first and at the last.

    Evaluations put the random generators back, and keep the model's mode; these replies are within them
    (:meth:`slimtune.training.resumable.ResumableTrainer.evaluate`). What the model can't do, or has no memory for,
    costs the replies alone.

    Args:
        answer: Answers the prompts: :class:`slimtune.use.samples.Samples`.
        metrics: Whose clock leaves this time out.
        safety: The run's.
        record: Takes one evaluation's replies.
    """

    def __init__(
        self, answer: Answer, metrics: MetricsCallback, safety: Safety, record: Callable[[dict[str, Any]], None]
    ) -> None:
        self.answer, self.metrics, self.safety, self.record = answer, metrics, safety, record
        self.times: list[float] = []
        """Seconds of each evaluation's replies."""
        self.evaluations = 0
        self.possible = True
        self.started = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer, if it is time."""
        if not self.possible or self.safety.signals.requested is not None:
            return
        self.evaluations += 1
        began = time.monotonic()
        if self.times and state.global_step < state.max_steps:
            between = sum(self.times[1:]) + self.times[-1]  # as long as the last time
            if between > SHARE / self.metrics.ranks * (began - self.started):
                return
        samples = self._answered(kwargs["model"])
        taken = time.monotonic() - began
        self.metrics.leave_out(taken, state.global_step)
        if samples is not None:
            self.times.append(taken)
            self.record({"step": state.global_step, "seconds": round(taken, 3), "samples": samples})

    def _answered(self, model: Any) -> list[dict[str, str]] | None:
        try:
            with one_dtype(model):
                return self.answer(model, SECONDS, self._goes_on)
        except torch.OutOfMemoryError:
            reason = "the GPU has no memory left for it"
        except (UserError, *CANT_TAKE) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        self.possible = False
        self.safety.warn(f"held-out prompts aren't answered in this run: {reason}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _goes_on(self) -> bool:
        """A token is progress, and a run that was asked to stop doesn't go on talking."""
        self.safety.watchdog.beat("a step")
        return self.safety.signals.requested is None

    @property
    def told(self) -> str:
        """What it came to, in a line; empty if nothing was answered."""
        if not self.times:
            return ""
        most = "a twentieth" if self.metrics.ranks == 1 else f"{SHARE / self.metrics.ranks:.1%}"
        left_out = f"; more would take over {most} of the run" if len(self.times) < self.evaluations else ""
        return f"answered at {len(self.times)} of {self.evaluations} evaluations, in {sum(self.times):.1f} s{left_out}"
