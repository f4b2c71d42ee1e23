"""Guards over the numbers: NaN and infinity before they are applied, and a loss that runs away.

The non-finite guard folds loss, gradients, parameters and optimizer state into one norm on the device and reads it once
a step, before the optimizer steps: one NaN or infinity anywhere makes it non-finite. Only then does it look for the
culprit, tensor by tensor.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Divergence", "DivergenceGuard", "NonFinite", "find_nonfinite", "fused_optimizer"]

WINDOW = 100
"""Losses that the running median is taken over."""


@dataclass(frozen=True)
class NonFinite:
    """A value that is no number, found before the optimizer step that would have applied it."""

    where: Literal["loss", "gradient", "parameter", "optimizer state"]
    name: str
    """The parameter's name; empty for the loss."""
    value: float

    def __str__(self) -> str:
        place = f" of {self.name}" if self.name else ""
        return f"{self.where}{place} is {self.value}"

    @property
    def applied(self) -> bool:
        """Whether the run's own state is bad, so that no batch can be blamed and nothing may be saved."""
        return self.where in ("parameter", "optimizer state")


def find_nonfinite(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> NonFinite | None:
    """Look at a step before it is applied. Waits for the device once if all is well.

    Args:
        loss: Sum of the step's micro-batch losses, a scalar on the device.
        model: Its trainable parameters and their gradients are looked at.
        optimizer: Its floating-point state is looked at.
    """
    fused = fused_optimizer(optimizer)
    total = loss.detach().float()
    # The fused optimizer's tensors are few: no walk over the model while all is well.
    if fused is not None and _all_finite([total, fused.flat.grad, fused.flat.data, *fused.float_state()]):
        return None
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[list[Tensor]] = [
        [total],
        [parameter.grad for _, parameter in named if parameter.grad is not None],
        [parameter.detach() for _, parameter in named],
        [tensor for _, tensor in _optimizer_tensors(named, optimizer)],
    ]
    if _all_finite([tensor for group in groups for tensor in group]):
        return None
    # The run's own state first: from a bad parameter the loss follows, and no batch is to blame.
    for name, parameter in named:
        if not torch.isfinite(parameter.detach()).all():
            return NonFinite("parameter", name, _worst(parameter.detach()))
    for name, tensor in _optimizer_tensors(named, optimizer):
        if not torch.isfinite(tensor).all():
            return NonFinite("optimizer state", name, _worst(tensor))
    if not torch.isfinite(loss).all():
        return NonFinite("loss", "", _worst(loss))
    for name, parameter in named:
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return NonFinite("gradient", name, _worst(parameter.grad))
    return None  # every value is finite; only the sum of their squares isn't


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether all values are finite: one norm, and one read. An overflowing norm says no."""
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1:  # one launch for all of them
        return bool(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).isfinite())
    return bool(torch.nn.utils.get_total_norm(tensors).isfinite())


def fused_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    """The fused optimizer, which keeps all parameters and their state in a few flat tensors; None if it is another."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    return inner if hasattr(inner, "float_state") else None


def _optimizer_tensors(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """The floating-point state of each parameter. 8-bit states are codes; their scales (absmax) tell."""
    fused = fused_optimizer(optimizer)
    if fused is not None:
        yield from (("all parameters", tensor) for tensor in fused.float_state())
        return
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and not key.startswith("qmap"):
                yield name, value


def _worst(tensor: Tensor) -> float:
    flat = tensor.detach().float().reshape(-1)
    return float(flat[~torch.isfinite(flat)][0].item())


@dataclass(frozen=True)
class Divergence:
    """The loss has been far over its running median for a while."""

    step: int
    loss: float
    median: float
    steps: int

    def __str__(self) -> str:
        return (
            f"the loss diverges: {self.loss:.4g} at step {self.step}, over {self.loss / self.median:.1f} times its "
            f"running median {self.median:.4g}, and high for {self.steps} steps"
        )


class DivergenceGuard:
    """Loss over ``factor`` times its running median for ``steps`` steps in a row.

    The median is over the last :data:`WINDOW` losses that weren't high themselves, so a run that stays high can't
    teach the guard to think so. It says nothing in the first ``steps`` steps, whose losses are the measure.
    """

    def __init__(self, factor: float, steps: int) -> None:
        self.factor, self.steps = factor, steps
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.high = 0

    def see(self, step: int, loss: float) -> Divergence | None:
        """Take in one step's loss; tells once in a row of ``steps`` high ones."""
        if loss != loss or loss in (float("inf"), float("-inf")):
            return None
        if len(self.losses) >= self.steps:
            median = statistics.median(self.losses)
            if loss > self.factor * median:
                self.high += 1
                return Divergence(step, loss, median, self.high) if self.high == self.steps else None
        self.high = 0
        self.losses.append(loss)
        return None

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": list(self.losses), "high": self.high}

    def load(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.high = state["high"]
