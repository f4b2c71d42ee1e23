"""Layers' inputs in page-locked RAM, from a layer's forward to its backward.

Of what the least plan keeps of a token most are the layers' inputs (8B: 262 KB of 394). A layer computes for longer
than its input takes over the bus, so a second stream copies beside it: out while the next layer's forward runs, back
while the backward of the layer above does. The bytes come back as they went, so gradients are those without it.

On the device lie two inputs at most: in the forward the one that is written and the one on its way, in the backward the
one that is read and the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from slimtune.engine.decoder import Saved
from slimtune.engine.ram import LockedRam

__all__ = ["Copies", "CopiesBeside", "CopiesInTurn", "InputsInRam", "copies_on"]


class Copies(Protocol):
    """Copies beside what computes."""

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy (target, source) once what was given to compute so far is done; gives what :meth:`wait` takes.

        All of them stay until then.
        """

    def wait(self, copied: Any) -> None:
        """What is given to compute from now on begins after this copy."""


class CopiesBeside:
    """On a CUDA stream of their own. The host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """See :meth:`Copies.begin`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(self._stream)
        return copied

    def wait(self, copied: torch.cuda.Event) -> None:
        """See :meth:`Copies.wait`."""
        torch.cuda.current_stream(self._device).wait_event(copied)


class CopiesInTurn:
    """Where one thing is done after the other anyway: a CPU."""

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See :meth:`Copies.begin`."""
        for target, source in pairs:
            target.copy_(source)

    def wait(self, copied: None) -> None:
        """See :meth:`Copies.wait`."""


def copies_on(device: torch.device) -> Copies:
    """What copies between RAM and a device."""
    return CopiesBeside(device) if device.type == "cuda" else CopiesInTurn()


class InputsInRam:
    """Places in RAM for some layers' inputs, each as large as the largest micro-batch's.

    Args:
        layers: Which layers', by their numbers.
        tokens: In the largest micro-batch, or part of one, that is computed at once.
        hidden: H.
        dtype: Of the inputs [T, H].
        device: Where the layers compute.

    Raises:
        UserError: The system gives no such memory, or doesn't lock it.
    """

    def __init__(
        self, layers: Iterable[int], tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        numbers = sorted(layers)
        self._device = device
        self.nbytes = len(numbers) * tokens * hidden * dtype.itemsize
        """That are locked."""
        self._ram = LockedRam(self.nbytes, device, "layers' inputs")
        self._places = dict(zip(numbers, self._ram.host.view(dtype).view(len(numbers), tokens, hidden), strict=True))
        self.copies: Copies = copies_on(device)
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._coming: dict[int, tuple[Tensor, Any]] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._places

    def begin(self) -> None:
        """A forward begins. One before it may have ended in an error (no memory), with copies still on their way."""
        self._settle(most=0)
        for _, copied in self._coming.values():
            self.copies.wait(copied)
        self._coming.clear()

    def put(self, layer: int, saved: Saved) -> None:
        """Send a layer's input to its place, once the layer's forward was given to compute."""
        first = saved.branches[0]
        place = self._places[layer][: first.s.shape[0]]
        copied = self.copies.begin([(place, first.s)])
        self._settle(most=0)
        # Another tensor may lie where the input does once nobody holds it: only a copy that is done lets go of it.
        self._leaving.append((first.s, copied))
        first.s = place

    def settle(self) -> None:
        """The forward is given to compute: what follows it begins after all copies."""
        self._settle(most=0)

    def _settle(self, most: int) -> None:
        while len(self._leaving) > most:
            _, copied = self._leaving[0]
            self.copies.wait(copied)
            self._leaving.popleft()

    def take(self, layer: int, saved: list[Saved], lowest: int = 0) -> None:
        """Before a layer's backward is given to compute: its input is there, and the next one's on its way.

        Args:
            layer: The layer's number.
            saved: What all layers up to it kept.
            lowest: The last layer that has a backward.
        """
        if layer in self and layer not in self._coming:
            self._fetch(layer, saved[layer])
        if layer in self._coming:
            self.copies.wait(self._coming[layer][1])
            del self._coming[layer]
        if layer - 1 in self and layer > lowest:
            self._fetch(layer - 1, saved[layer - 1])

    def _fetch(self, layer: int, saved: Saved) -> None:
        first = saved.branches[0]
        place, first.s = first.s, torch.empty(first.s.shape, dtype=first.s.dtype, device=self._device)
        self._coming[layer] = first.s, self.copies.begin([(first.s, place)])
