"""What this run will do on this machine: every ``auto`` of the config decided, with the reason.

The decisions become part of the resolved config that the run records, and ``slimtune explain`` tells them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slimtune.config import Config
from slimtune.hardware import Hardware

__all__ = ["Choice", "default_output", "resolve_machine", "resolve_steps"]

SAVES_IN_A_RUN = 10


@dataclass(frozen=True)
class Choice:
    """One value that was chosen for the person, and why."""

    key: str
    value: Any
    reason: str


def default_output(model: str, now: datetime) -> Path:
    """``runs/<time>-<model>``, for a run that was given no folder."""
    name = Path(model).name.lower() or "model"
    return Path("runs") / f"{now:%Y%m%d-%H%M%S}-{name}"


def resolve_machine(config: Config, hardware: Hardware) -> tuple[Config, list[Choice]]:
    """Decide what depends on the machine: dtype and optimizer."""
    choices: list[Choice] = []
    if config.compute_dtype == "auto":
        choices.append(Choice("compute_dtype", hardware.compute_dtype, hardware.compute_dtype_reason))
    if config.optim == "auto":
        if hardware.device == "cuda":
            choices.append(Choice("optim", "paged_adamw_8bit", "8-bit states, paged to RAM when the GPU runs short"))
        else:
            choices.append(
                Choice(
                    "optim",
                    "adamw_8bit",
                    "the same 8-bit states; paging moves them between GPU and RAM, and here is no GPU",
                )
            )
    return _with(config, choices), choices


def resolve_steps(config: Config, micro_batches_per_epoch: int) -> tuple[Config, list[Choice], int]:
    """Decide what depends on the data's length; also gives the run's number of optimizer steps."""
    steps_per_epoch = max(1, math.ceil(micro_batches_per_epoch / config.gradient_accumulation))
    total = config.max_steps or max(1, math.ceil(config.epochs * steps_per_epoch))
    choices: list[Choice] = []
    every = max(1, math.ceil(total / SAVES_IN_A_RUN))
    if config.save_steps == "auto":
        choices.append(Choice("save_steps", every, f"{total} optimizer steps, so about {SAVES_IN_A_RUN} checkpoints"))
    if config.eval_steps == "auto" and (config.eval or config.eval_share):
        steps = every if config.save_steps == "auto" else config.save_steps
        choices.append(Choice("eval_steps", steps, "an evaluation with each checkpoint"))
    return _with(config, choices), choices, total


def _with(config: Config, choices: list[Choice]) -> Config:
    return config.model_copy(update={choice.key: choice.value for choice in choices})
