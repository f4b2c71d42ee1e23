"""What this run will do on this machine: every ``auto`` of the config decided, with the reason.

The decisions become part of the resolved config that the run records, and ``slimtune explain`` tells them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slimtune.config import Config
from slimtune.hardware import Hardware

__all__ = [
    "Choice",
    "default_output",
    "memory_budget",
    "micro_batches_of_run",
    "resolve_machine",
    "resolve_steps",
    "steps_of_run",
]

SAVES_IN_A_RUN = 10
MEMORY_SHARE = 0.9
"""Of the card's memory that training may take: the rest is the CUDA context's and fragmentation's."""


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
    """Decide what depends on the machine: dtype, optimizer, memory."""
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
    if config.memory == "auto" and hardware.device == "cuda":
        share = f"{hardware.memory_bytes * MEMORY_SHARE / 2**30:.2f}GiB"
        choices.append(Choice("memory", share, f"{MEMORY_SHARE:.0%} of what {hardware.name} has"))
    return _with(config, choices), choices


def memory_budget(config: Config) -> int | None:
    """Most bytes that training may take on the GPU; None where there is no limit to keep (a CPU)."""
    if config.memory == "auto":
        return None
    number, unit = re.fullmatch(r"([\d.]+)\s?(\w+)", config.memory).groups()  # type: ignore[union-attr]
    return int(float(number) * {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}[unit])


def micro_batches_of_run(config: Config, per_epoch: int) -> int:
    """Micro-batches of the whole run, over all its epochs."""
    if config.max_steps is not None:
        return config.max_steps * config.gradient_accumulation
    return max(1, math.ceil(config.epochs * per_epoch))


def steps_of_run(config: Config, per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return math.ceil(micro_batches_of_run(config, per_epoch) / config.gradient_accumulation)


def resolve_steps(config: Config, per_epoch: int) -> tuple[Config, list[Choice]]:
    """Decide what depends on the data's length, ``per_epoch`` micro-batches."""
    total = steps_of_run(config, per_epoch)
    choices: list[Choice] = []
    every = max(1, math.ceil(total / SAVES_IN_A_RUN))
    if config.save_steps == "auto":
        choices.append(
            Choice("save_steps", every, f"{total} optimizer steps, so about {math.ceil(total / every)} checkpoints")
        )
    if config.eval_steps == "auto" and (config.eval or config.eval_share):
        steps = every if config.save_steps == "auto" else config.save_steps
        choices.append(Choice("eval_steps", steps, "an evaluation with each checkpoint"))
    return _with(config, choices), choices


def _with(config: Config, choices: list[Choice]) -> Config:
    return config.model_copy(update={choice.key: choice.value for choice in choices})
