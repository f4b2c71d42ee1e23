"""A run on its way to a checkpoint: what the end of a step must note, and what can wait until the next has begun.

Random streams, logs and counters change with the next step's first lines of Python, so the end of a step notes them
(:class:`Moment`). What is trained (:class:`Trained`) stays as it is until the next optimizer step. On a GPU it is
copied when the device has the next step's work already, on a stream beside it that waits for the step before alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapter.settings import ADAPTER_CONFIG
from slimtune.adapter.state import adapter_config_bytes
from slimtune.run.identity import Identity
from slimtune.training.checkpoint import (
    IDENTITY,
    STATE,
    TRAINER_STATE,
    OffDevice,
    Snapshot,
    from_plain,
    json_bytes,
    to_plain,
)
from slimtune.training.guard import fused_optimizer
from slimtune.training.rng import RandomState

__all__ = ["Moment", "Trained", "snapshot"]


def _reached() -> torch.cuda.Event | None:
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


@dataclass(frozen=True)
class Moment:
    """A run at the end of a step, but for what is trained. Making one waits for no kernel."""

    step: int
    position: int
    """Micro-batches that the run has trained on, over all its epochs."""
    draws: tuple[RandomState, Any]
    """Random generators, and the fused engine's own."""
    logs: dict[str, Any]
    """What the Trainer has added up since the last line of the log; ``loss`` is a tensor on the device."""
    progress: dict[str, Any]
    trainer_state: dict[str, Any]
    reached: torch.cuda.Event | None = field(default_factory=_reached)
    """When the device has done all that it was given until now; None without a GPU."""

    @property
    def can_wait(self) -> bool:
        """Whether there is a device that works on while copies are made."""
        return self.reached is not None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within this the device is asked for things as of this moment, beside what it was given since.

        What it is given afterwards, it does after them.
        """
        if self.reached is None:
            yield
            return
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_event(self.reached)
        with torch.cuda.stream(beside):
            yield
        torch.cuda.current_stream().wait_stream(beside)


@dataclass(frozen=True)
class Trained:
    """What an optimizer step changes."""

    model: nn.Module
    adapter: Mapping[str, Tensor]
    """The parameters themselves, by the names that PEFT saves them under."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: Any = None
    """``torch.amp.GradScaler``, with fp16."""

    def storages(self) -> list[Tensor]:
        """Tensors in whose storages the adapter and the optimizer's state lie."""
        fused = fused_optimizer(self.optimizer)
        if fused is not None:
            few: list[Tensor] = fused.storage()
            return few
        return [*self.adapter.values(), *to_plain(self.optimizer.state_dict())[1].values()]

    def state_dicts(self) -> dict[str, Any]:
        """Of optimizer, schedule and loss scale: the tensors themselves, the numbers as they are now."""
        optimizer = self.optimizer.state_dict()
        # The inner dicts of some optimizers are those that they count their steps in.
        optimizer["state"] = {index: dict(entry) for index, entry in optimizer["state"].items()}
        parts = {"optimizer": optimizer, "schedule": self.schedule.state_dict()}
        return parts if self.scaler is None else {**parts, "scaler": self.scaler.state_dict()}

    def load(self, plain: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :func:`snapshot` wrote of :meth:`state_dicts`; rates and weight decay stay the config's, which
        may be others than they were."""
        parts = from_plain(plain, tensors)
        rates = self.schedule.base_lrs
        decays = [group.get("weight_decay") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict({**parts["schedule"], "base_lrs": rates})
        self.schedule._last_lr = [
            rate * shape(self.schedule.last_epoch) for rate, shape in zip(rates, self.schedule.lr_lambdas, strict=True)
        ]
        for group, now, rate, decay in zip(
            self.optimizer.param_groups, self.schedule._last_lr, rates, decays, strict=True
        ):
            group |= {"lr": now, "initial_lr": rate} | ({} if decay is None else {"weight_decay": decay})
        if "scaler" in parts:
            self.scaler.load_state_dict(parts["scaler"])


def snapshot(moment: Moment, trained: Trained, identity: Identity) -> Callable[[], Snapshot]:
    """Ask for copies of what is trained, which must be as it was at ``moment``.

    Returns:
        What waits for the copies and makes the snapshot of them; for another thread.
    """
    loss = moment.logs["loss"]
    with moment.beside():
        state_dicts = trained.state_dicts()
        copies = OffDevice([*trained.storages(), loss])

    def made() -> Snapshot:
        plain, tensors = to_plain(state_dicts)
        random, engine = moment.draws
        logs = {**moment.logs, "loss": float(copies.of({"loss": loss})["loss"])}
        state = {
            "progress": {**moment.progress, "logs": logs},
            "position": moment.position,
            "engine": engine,
            "plain": plain,
        }
        return Snapshot(
            moment.step,
            {
                "adapter_model": copies.of(trained.adapter),
                "optimizer": copies.of(tensors),
                "random": random.to_tensors(),
            },
            {
                ADAPTER_CONFIG: adapter_config_bytes(trained.model),
                STATE: json_bytes(state),
                TRAINER_STATE: json_bytes(moment.trainer_state),
                IDENTITY: identity.to_bytes(),
            },
        )

    return made
