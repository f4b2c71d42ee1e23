"""Page-locked RAM of exact sizes, and tensors over it that the device reads.

Torch's own pinned memory is rounded up to powers of two, and kept. The driver gives locked RAM the same address on the
device as on the host, so that a tensor of the device may lie over it: its kernels read it over the bus, at the bus'
rate. That suits what is read a row a token, and whatever has to work and needn't be fast.
"""

from __future__ import annotations

import bisect
import mmap
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.hardware import free_ram
from slimtune.ranks.host import here

__all__ = ["LockedRam", "host_of", "keep_there", "ram_to_lock"]

_RAM_SHARE = 0.7
"""Of the RAM that is free: pages that are locked are nobody else's, and the run itself needs some."""
_STARTS: list[int] = []
_PAGES: dict[int, weakref.ref[Any]] = {}
"""All that is locked, by where it starts; the starts in order."""


class _Pages(np.ndarray):
    """Whose end is that of the last tensor over it."""


class LockedRam:
    """RAM that is locked as long as there is a tensor over it. Beside a CPU it is RAM like any other.

    Args:
        nbytes: Of it, not a byte more.
        device: Which reads it.
        what: It is for.
        memory: That it is to be, uint8 [nbytes] in RAM that other processes see too; None: its own.

    Raises:
        UserError: The system gives no such memory, or doesn't lock it.

    Attributes:
        host: uint8 [nbytes], the host's.
    """

    def __init__(self, nbytes: int, device: torch.device, what: str, memory: Tensor | None = None) -> None:
        self._device = device
        pages = _asked_for(nbytes, what) if memory is None else memory.numpy()
        array = np.frombuffer(pages, dtype=np.uint8).view(_Pages)
        self.host: Tensor = torch.from_numpy(array)
        if memory is None:
            self.host.zero_()  # by all threads; the driver would ask for page after page
        if device.type == "cuda":
            _lock(self.host, what)
        start = self.host.data_ptr()
        bisect.insort(_STARTS, start)
        _PAGES[start] = weakref.ref(array)
        ended = weakref.finalize(array, _end, start, pages, locked=device.type == "cuda")
        ended.atexit = False  # with the process all of it goes anyway

    def on_device(self) -> Tensor:
        """uint8 [nbytes] of the device, over the same memory."""
        return torch.as_tensor(self, device=self._device) if self._device.type == "cuda" else self.host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which torch makes a tensor of it, which holds this object."""
        return {
            "shape": (self.host.numel(),), "typestr": "|u1", "data": (self.host.data_ptr(), False), "strides": None,
            "version": 3,
        }  # fmt: skip


def host_of(tensor: Tensor) -> Tensor | None:
    """A tensor over locked RAM as the host has it; None if it lies elsewhere."""
    at = bisect.bisect_right(_STARTS, tensor.data_ptr()) - 1
    array = _PAGES[_STARTS[at]]() if at >= 0 else None
    start = 0 if array is None else tensor.data_ptr() - _STARTS[at]
    if array is None or start >= array.nbytes:
        return None
    return torch.from_numpy(array)[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def keep_there(tensor: Tensor, host: Tensor, what: str, *, writes: bool) -> None:
    """See that ``host``, in RAM, holds what ``tensor`` does: write it; or compare, where another rank has written it.

    Raises:
        UserError: It holds something else.
    """
    if writes:
        host.copy_(tensor)
    elif not torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (host, tensor.cpu()))):
        raise UserError(
            f"what this rank has for the {what} isn't what another rank of its host has",
            rule="Weights in RAM are there once a host.",
            way_out="Give all ranks the same base; if it is the same, a card or its memory may be faulty.",
        )


def ram_to_lock() -> int:
    """Most bytes of its host's RAM that each rank of a run may lock now; no rank's host has less."""
    return here().least("RAM that is free", int(_RAM_SHARE * free_ram() / here().count))


def _asked_for(nbytes: int, what: str) -> mmap.mmap:
    try:
        # Not torch's, whose allocator would keep the memory. Private, as shared memory has small pages.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise _refusal(nbytes, what, str(error)) from None
    # Large pages are locked in a fraction of the time; a process that is forked would be given a copy of locked ones.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with suppress(AttributeError, OSError):  # a system that has no such thing
            pages.madvise(getattr(mmap, advice))
    return pages


def _lock(host: Tensor, what: str) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    if int(status) != 0:
        raise _refusal(host.nbytes, what, str(runtime.cudaGetErrorString(status)))


def _refusal(nbytes: int, what: str, why: str) -> UserError:
    return UserError(
        f"{nbytes / 2**30:.2f}GiB of RAM can't be locked for the {what}: {why}",
        rule="What doesn't fit the GPU beside the rest goes to RAM: layers' inputs and weights, the embedding.",
        way_out="Free RAM, or take a smaller --max-length; with more GPU memory (--memory) less of it is needed.",
    )


def _end(start: int, _: Any, *, locked: bool) -> None:
    """The last tensor is gone; the pages, which this holds, go when it is done."""
    _STARTS.remove(start)
    del _PAGES[start]
    if locked:
        torch.cuda.synchronize()  # a copy that was begun for nobody may still read it
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostUnregister(start)
