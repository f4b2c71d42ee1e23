"""What layers keep in page-locked RAM, from a layer's forward to its backward.

Of what the least plan keeps of a token most are the layers' inputs (8B: 262 KB of 394). A layer computes for longer
than its input takes over the bus, so a second stream copies beside it: out while the next layer's forward runs, back
while the backward of the layer above does. The bytes come back as they went, so gradients are those without it. What
else a layer keeps goes the same way, if it takes less time over the bus than to be computed again.

On the device lie two layers' at most: in the forward what is written and what is on its way, in the backward what is
read and the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from slimtune.engine.decoder import Saved
from slimtune.engine.ram import LockedRam

__all__ = ["Copies", "CopiesBeside", "CopiesInTurn", "KeptInRam", "copies_on"]


_LEAST = 256
"""Bytes of a memory that is worth a copy of its own: a kernel's seed isn't."""


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


@dataclass(frozen=True)
class _Waiting:
    """A tensor whose memory is in RAM."""

    place: Tensor
    """uint8, all of that memory, of which others may be views too."""
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def over(self, memory: Tensor) -> Tensor:
        """It, over a copy of that memory on the device."""
        empty = torch.empty(0, dtype=self.dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), self.offset, self.size, self.stride)


class KeptInRam:
    """Places in RAM for what some layers keep, each as large as of the largest micro-batch.

    Args:
        sizes: Of which layers, by their numbers, how many bytes.
        device: Where the layers compute.

    Raises:
        UserError: The system gives no such memory, or doesn't lock it.
    """

    def __init__(self, sizes: Mapping[int, int], device: torch.device) -> None:
        self._device = device
        self.nbytes = sum(sizes.values())
        """That are locked."""
        self._ram = LockedRam(self.nbytes, device, "layers' activations")
        self._places = dict(zip(sizes, torch.split(self._ram.host, list(sizes.values())), strict=True))
        self.copies: Copies = copies_on(device)
        self._leaving: deque[tuple[list[Tensor], Any]] = deque()
        self._coming: dict[int, tuple[list[Tensor], Any]] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._places

    def begin(self) -> None:
        """A forward begins. One before it may have ended in an error (no memory), with copies still on their way."""
        self._settle()
        for _, copied in self._coming.values():
            self.copies.wait(copied)
        self._coming.clear()

    def put(self, layer: int, saved: Saved) -> Saved:
        """Send what a layer keeps to its place, once the layer's forward was given to compute; what is kept instead.

        What the plan doesn't count stays on the device: a kernel's seed, and what there is no room for.
        """
        place, used = self._places[layer], 0
        memories: dict[int, Tensor] = {}
        places: dict[int, Tensor] = {}

        def sent(tensor: Tensor) -> Any:
            nonlocal used
            memory = tensor.untyped_storage()
            at = memory.data_ptr()
            if at not in places:
                if memory.nbytes() < _LEAST or used + memory.nbytes() > len(place) or tensor.device != self._device:
                    return tensor
                memories[at] = torch.empty(0, dtype=torch.uint8, device=self._device).set_(memory)
                places[at] = place[used : used + memory.nbytes()]
                used += memory.nbytes()
            return _Waiting(places[at], tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        waiting: Saved = _each(saved, Tensor, sent)
        copied = self.copies.begin([(places[at], memory) for at, memory in memories.items()])
        self._settle()
        # Another tensor may lie where this one does once nobody holds it: only a copy that is done lets go of it.
        self._leaving.append((list(memories.values()), copied))
        return waiting

    def settle(self) -> None:
        """The forward is given to compute: what follows it begins after all copies."""
        self._settle()

    def _settle(self) -> None:
        while self._leaving:
            _, copied = self._leaving[0]
            self.copies.wait(copied)
            self._leaving.popleft()

    def take(self, layer: int, saved: list[Saved], lowest: int = 0) -> None:
        """Before a layer's backward is given to compute: what it kept is there, and the next one's on its way.

        Args:
            layer: The layer's number.
            saved: What all layers up to it kept; that of the layer and of the next one is put there.
            lowest: The last layer that has a backward.
        """
        if layer in self and layer not in self._coming:
            self._fetch(layer, saved)
        if layer in self._coming:
            self.copies.wait(self._coming[layer][1])
            del self._coming[layer]
        if layer - 1 in self and layer > lowest:
            self._fetch(layer - 1, saved)

    def _fetch(self, layer: int, saved: list[Saved]) -> None:
        memories: dict[int, tuple[Tensor, Tensor]] = {}

        def brought(waiting: _Waiting) -> Tensor:
            at = waiting.place.data_ptr()
            if at not in memories:
                memories[at] = torch.empty_like(waiting.place, device=self._device), waiting.place
            return waiting.over(memories[at][0])

        saved[layer] = _each(saved[layer], _Waiting, brought)
        pairs = list(memories.values())
        self._coming[layer] = [memory for memory, _ in pairs], self.copies.begin(pairs)


def _each(owner: Any, kind: type, changed: Callable[[Any], Any]) -> Any:
    """What a layer kept, with everything of a kind in it changed."""
    if isinstance(owner, kind):
        return changed(owner)
    if is_dataclass(owner) and not isinstance(owner, type):
        return replace(owner, **{each.name: _each(getattr(owner, each.name), kind, changed) for each in fields(owner)})
    if isinstance(owner, list | tuple):
        parts = [_each(part, kind, changed) for part in owner]
        return owner._make(parts) if hasattr(owner, "_make") else type(owner)(parts)
    return owner
