"""Faults that a campaign puts into a run's process before its command starts (``Process(before="…:name")``)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch

from slimtune.data.packing import PackedBatches
from slimtune.data.preflight import Proof
from slimtune.run import durable
from slimtune.training.fused import FusedTrainer
from slimtune.training.hooks import Hooks
from slimtune.training.resumable import ResumableTrainer


def hang(where: str, how: str, at: int) -> None:
    """From the ``at``-th micro-batch, step or save on, hang in that place.

    Args:
        where: preparation, data, step or save.
        how: sleep, lock, pipe or child: what the code is stuck in.
        at: Counted from 1.
    """
    seen = {"count": 0}

    def stuck_here() -> None:
        seen["count"] += 1
        if seen["count"] < at:
            return
        if how == "sleep":
            time.sleep(3600)
        elif how == "lock":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        elif how == "pipe":
            os.read(os.pipe()[0], 1)
        else:
            subprocess.run(["sleep", "3600"], check=True)

    def before(target: Any, name: str) -> None:
        original = getattr(target, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            stuck_here()
            return original(*args, **kwargs)

        setattr(target, name, wrapped)

    places = {
        "preparation": (Proof, "save_ledger"),
        "data": (PackedBatches, "batch"),
        "step": (ResumableTrainer, "_run_pieces"),
        "save": (durable, "_seal"),
    }
    before(*places[where])


def count_steps(file: str) -> None:
    """Keep the number of steps that are over in ``file``: the metrics' line comes after the look for signals."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    original = Hooks.on_step_end

    def on_step_end(self: Hooks, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        os.pwrite(descriptor, b"%9d" % state.global_step, 0)
        original(self, args, state, *more, **kwargs)

    Hooks.on_step_end = on_step_end  # type: ignore[method-assign]


def poison(where: str, step: int) -> None:
    """A NaN in the loss, a gradient, a parameter or the optimizer's state in one step, before the optimizer steps."""
    original = ResumableTrainer._before_optimizer

    def before_optimizer(self: ResumableTrainer) -> None:
        if self.state.global_step + 1 == step:
            parameter = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            if where == "loss":
                self._step_losses[1] = self._step_losses[1] * float("nan")
            elif where == "gradient":
                parameter.grad.view(-1)[0] = float("nan")
            elif where == "parameter":
                parameter.data.view(-1)[0] = float("nan")
            elif hasattr(optimizer, "float_state"):
                next(tensor for tensor in optimizer.float_state() if tensor.numel()).view(-1)[0] = float("nan")
            else:
                optimizer.state[parameter]["state2"].view(-1)[0] = float("nan")
        original(self)

    ResumableTrainer._before_optimizer = before_optimizer  # type: ignore[method-assign]


def refuse_large(step: int, tokens: int) -> None:
    """From ``step`` on, memory runs out in the middle of a pass over more than ``tokens`` tokens."""
    original = FusedTrainer.training_step

    def training_step(self: FusedTrainer, model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
        loss = original(self, model, inputs, items)  # leaves gradients behind, as a real failure may
        if self.state.global_step + 1 >= step and inputs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    FusedTrainer.training_step = training_step  # type: ignore[method-assign]


def slow(seconds: float) -> None:
    """Each step takes this much longer, so that there is time to do something to its disk."""
    original = ResumableTrainer._before_optimizer

    def before_optimizer(self: ResumableTrainer) -> None:
        time.sleep(seconds)
        original(self)

    ResumableTrainer._before_optimizer = before_optimizer  # type: ignore[method-assign]


def fill_card(step: int) -> None:
    """Before ``step``, fill the card up, down to 60 % of what a step takes beyond what is held between two steps."""
    original = ResumableTrainer._draws
    state: dict[str, Any] = {"held": 0, "filling": []}

    def draws(self: ResumableTrainer) -> Any:
        now = self.state.global_step + 1
        if now == step - 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            state["held"] = torch.cuda.memory_allocated()
        elif now == step and not state["filling"]:
            torch.cuda.synchronize()
            leave = int(0.6 * (torch.cuda.max_memory_allocated() - state["held"]))
            torch.cuda.empty_cache()
            size = torch.cuda.mem_get_info()[0] - leave
            while not state["filling"]:
                try:
                    state["filling"].append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:
                    size -= 2 << 20
            print(f"{size >> 20} MiB filled, {torch.cuda.mem_get_info()[0] >> 20} MiB left", flush=True)
        return original(self)

    ResumableTrainer._draws = draws  # type: ignore[method-assign]


class Operations:
    """Stands for :mod:`os` in the durable module: does something after, or instead of, its n-th file operation."""

    NAMES = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")

    def __init__(self, at: int, action: Any, instead: bool = False) -> None:
        self.at, self.action, self.instead = at, action, instead
        self.log: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.NAMES:
            return real

        def operation(*args: Any, **kwargs: Any) -> Any:
            path = (
                f"/proc/self/fd/{args[0]}"
                if name in ("write", "fsync", "close")
                else str(args[-1 if name == "rename" else 0])
            )
            self.log.append((name, Path(path).resolve().name if path.startswith("/proc") else Path(path).name))
            now = len(self.log) == self.at
            if now and self.instead:
                self.action()
            result = real(*args, **kwargs)
            if now and not self.instead:
                self.action()
            return result

        return operation
