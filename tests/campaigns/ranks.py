"""Several processes as the ranks of one run, each told by its environment as torchrun would."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaigns.campaign import Process


def as_rank(rank: int, count: int, port: int) -> None:
    """Called in a rank's process before its command."""
    told = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"})


def as_rank_of(rank: int, count: int, port: int, cards: str) -> None:
    """As :func:`as_rank`, on a host with these GPUs."""
    as_rank(rank, count, port)
    os.environ["CUDA_VISIBLE_DEVICES"] = cards


def as_rank_with(rank: int, count: int, port: int, odd: list[str]) -> None:
    """As :func:`as_rank`; the last rank's command has ``odd`` behind it."""
    from slimtune import cli

    as_rank(rank, count, port)
    if rank == count - 1:
        plain = cli.slimtune_command.main

        def main(args: list[str], **rest: Any) -> Any:
            return plain(args=[*args, *odd], **rest)

        cli.slimtune_command.main = main  # type: ignore[method-assign]


def noting(rank: int, count: int, port: int, file: str) -> None:
    """As :func:`as_rank`; rank 0 notes each step's gradient, summed up and not clipped yet."""
    import torch

    from slimtune.training.fused import FusedTrainer

    if count > 1:
        as_rank(rank, count, port)
    plain, noted = FusedTrainer._clip_grad_norm, []

    def clip(trainer: Any, model: Any) -> Any:
        noted.append(trainer.engine.flat.grad.clone())
        if rank == 0:
            torch.save(torch.stack(noted), file)
        return plain(trainer, model)

    FusedTrainer._clip_grad_norm = clip  # type: ignore[method-assign]


def at_last(rank: int, count: int, port: int, fault: str, values: dict[str, Any], folder: str = ".") -> None:
    """As :func:`as_rank`, in ``folder``; the last rank's process has a fault of :mod:`tests.campaigns.faults` or of
    this module."""
    from tests.campaigns import faults

    as_rank(rank, count, port)
    os.chdir(folder)
    if rank == count - 1:
        (globals().get(fault) or getattr(faults, fault))(**values)


def spoil(where: str, step: int) -> None:
    """In one step, before the ranks come together, a NaN in this one's loss or gradient; or a bit of its adapter."""
    from slimtune.training.ranked import RankedTrainer

    original = RankedTrainer._come_together

    def come_together(self: RankedTrainer) -> None:
        if self.state.global_step + 1 == step:
            parameter = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            if where == "loss":
                self._step_losses[0] = self._step_losses[0] * float("nan")
            elif where == "gradient":
                parameter.grad.view(-1)[0] = float("nan")
            else:
                parameter.data.view(-1)[0].mul_(-1.0)
        original(self)

    RankedTrainer._come_together = come_together  # type: ignore[method-assign]


def unlike(what: str, **values: Any) -> None:
    """This process's host is another: its card, its versions, the files that it has under the same names, or its
    card's free memory."""
    import dataclasses

    import torch
    from transformers import PreTrainedModel

    from slimtune import recipes

    detect, library_versions = recipes.detect, recipes.library_versions

    def without_room(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if what == "card":
        recipes.detect = lambda: dataclasses.replace(detect(), name="another card", memory_bytes=24 << 30)
    elif what == "versions":
        recipes.library_versions = lambda: library_versions() | {"peft": "0.21.1"}
    elif what == "files":
        os.chdir(values["folder"])
    else:
        PreTrainedModel.from_pretrained = without_room


def blocked_disk(rank: int, count: int, port: int, metrics: str, over: str) -> None:
    """As :func:`as_rank`; rank 0's disk writes its first checkpoint only once the run is ten steps further, and its
    last one only once there is a file ``over``."""
    from slimtune.training.checkpoint import Checkpoints

    as_rank(rank, count, port)
    plain, begun = Checkpoints._write, []

    def told(key: str) -> int:
        return max(json.loads(line).get(key, 0) for line in Path(metrics).read_text().splitlines())

    def write(self: Checkpoints, snapshot: Any) -> None:
        if not begun:
            begun.append(snapshot.step)
            _wait_for(lambda: told("step") >= snapshot.step + 10, self)
        elif snapshot.step == told("steps"):
            _wait_for(Path(over).exists, self)
        plain(self, snapshot)

    if rank == 0:
        Checkpoints._write = write  # type: ignore[method-assign]


def _wait_for(condition: Callable[[], bool], checkpoints: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError("somebody waits for this disk")
        checkpoints.beat("a save")
        time.sleep(0.01)


class Ranks:
    """``count`` processes of one command."""

    def __init__(self, count: int, arguments: list[str], log: Path, before: str = "as_rank", **values: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            Process(
                arguments, log.with_suffix(f".{rank}.log"), f"tests.campaigns.ranks:{before}", rank=rank, count=count,
                port=port, **values,
            )
            for rank in range(count)
        ]  # fmt: skip

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Their exit codes."""
        until = time.monotonic() + seconds
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def output(self) -> str:
        return "".join(f"rank {rank}:\n{each.output()}" for rank, each in enumerate(self.processes))
