"""What this run will do on this machine: every ``auto`` of the config decided, with the reason.

The decisions become part of the resolved config that the run records, and ``slimtune explain`` tells them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.config import Config
from slimtune.hardware import Hardware

if TYPE_CHECKING:
    from slimtune.data.documents import Documents

__all__ = [
    "Choice",
    "default_output",
    "few_steps",
    "memory_budget",
    "micro_batches_of_run",
    "resolve_held_out",
    "resolve_machine",
    "resolve_steps",
    "resolved",
    "steps_of_run",
]

SAVES_IN_A_RUN = 10
EVALUATION_SHARE = 0.1
"""Of a run's work that evaluations may take, unless their number is given."""
FEW_STEPS = 60
"""With fewer optimizer steps an adapter that begins at nothing has hardly moved."""
_TILE = 64
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
    return resolved(config, choices), choices


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
    return max(1, math.ceil(round(config.epochs * per_epoch, 6)))  # 0.1 x 30 is a little over 3 in floats


def steps_of_run(config: Config, per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return math.ceil(micro_batches_of_run(config, per_epoch) / config.gradient_accumulation)


def few_steps(config: Config, per_epoch: int, documents: Documents) -> str | None:
    """What to say of a run of too few optimizer steps to learn from, and what to set; None if there are enough.

    Args:
        config: What is to run. Steps that it names itself are taken as meant.
        per_epoch: Micro-batches in an epoch.
        documents: What it trains on.
    """
    steps = steps_of_run(config, per_epoch)
    if config.max_steps is not None or steps >= FEW_STEPS:
        return None
    changes: dict[str, Any] = {"gradient_accumulation": 1, "micro_batch": 1}
    longest = _TILE * math.ceil(int(documents.lengths.max()) / _TILE)
    if config.packing and longest < config.max_length:
        changes["max_length"] = longest
    parts = math.ceil(documents.tokens / longest) if config.packing else len(documents)
    epochs = math.ceil(FEW_STEPS / max(1, parts, per_epoch))
    if epochs > config.epochs:
        changes["epochs"] = epochs
    flags = [f"--{key.replace('_', '-')} {value}" for key, value in changes.items() if value != getattr(config, key)]
    what = f"{steps} optimizer step{'s are' if steps > 1 else ' is'} little to learn from"
    return f"{what}: about {FEW_STEPS} or more by {' '.join(flags)}"


def resolve_held_out(config: Config, share: float, rows: int) -> tuple[Config, list[Choice]]:
    """Decide what isn't trained on.

    Args:
        config: What is to run.
        share: Of the rows that the proof of the data has held out.
        rows: Different rows that it is a share of.
    """
    if config.eval_share != "auto":
        return config, []
    reason = f"{round(share * rows):,} of {rows:,} different rows: a twentieth, 8 at least and 200 at most"
    if config.eval:
        reason = "eval names the held-out data"
    elif not share:
        reason = f"none of {rows:,} different rows, as they are fewer than 20"
    choices = [Choice("eval_share", share, reason)]
    return resolved(config, choices), choices


def resolve_steps(config: Config, per_epoch: int, eval_work: float = 0.0) -> tuple[Config, list[Choice]]:
    """Decide what depends on the data's length.

    Args:
        config: What is to run.
        per_epoch: Micro-batches in an epoch.
        eval_work: Tokens of an evaluation over those of an epoch.
    """
    total = steps_of_run(config, per_epoch)
    choices: list[Choice] = []
    whole = micro_batches_of_run(config, per_epoch) / per_epoch
    if config.max_steps is None and not math.isclose(whole, config.epochs):
        reason = f"{config.epochs:g} epochs rounded up to whole micro-batches, of which an epoch has {per_epoch:,}"
        choices.append(Choice("epochs", whole, reason))
    every = max(1, math.ceil(total / SAVES_IN_A_RUN))
    if config.save_steps == "auto":
        choices.append(
            Choice("save_steps", every, f"{total} optimizer steps, so about {math.ceil(total / every)} checkpoints")
        )
    if config.eval_steps == "auto" and (config.eval or config.eval_share):
        # Not as the checkpoints, which may be made at other steps without the run being another.
        often = max(1, math.ceil(total / _evaluations(config, whole, eval_work)))
        choices.append(
            Choice("eval_steps", often, f"{total} optimizer steps, so about {math.ceil(total / often)} evaluations")
        )
    return resolved(config, choices), choices


def _evaluations(config: Config, epochs: float, eval_work: float) -> int:
    """How many of a run take no more than a tenth of its work: a token that is trained on takes three times as much."""
    if config.early_stopping is not None or not eval_work:
        return SAVES_IN_A_RUN
    return max(1, min(SAVES_IN_A_RUN, int(EVALUATION_SHARE * 3 * epochs / eval_work)))


def resolved(config: Config, choices: list[Choice]) -> Config:
    """``config`` with what was chosen."""
    return config.model_copy(update={choice.key: choice.value for choice in choices})
