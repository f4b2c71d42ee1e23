"""Page-locked RAM of exact sizes, and tensors over it that the device reads.

Torch's own pinned memory is rounded up to powers of two, and kept. The driver gives locked RAM the same address on the
device as on the host, so that a tensor of the device may lie over it: its kernels read it over the bus, at the bus'
rate. That suits what is read a row a token, and whatever has to work and needn't be fast.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.hardware import free_ram

__all__ = ["LockedRam", "locked_ram_of", "ram_to_lock"]

_RAM_SHARE = 0.7
"""Of the RAM that is free: pages that are locked are nobody else's, and the run itself needs some."""
_ALL: weakref.WeakSet[LockedRam] = weakref.WeakSet()


class LockedRam:
    """RAM that is locked as long as this object lives, which tensors of the device over it hold.

    Beside a CPU it is RAM like any other.

    Args:
        nbytes: Of it, not a byte more.
        device: Which reads it.
        what: It is for.

    Raises:
        UserError: The system gives no such memory, or doesn't lock it.

    Attributes:
        host: uint8 [nbytes], the host's.
    """

    def __init__(self, nbytes: int, device: torch.device, what: str) -> None:
        self._device, cuda = device, device.type == "cuda"
        self.host: Tensor = _locked(nbytes, what) if cuda else torch.empty(nbytes, dtype=torch.uint8)
        if cuda:
            unlocked = weakref.finalize(self, _unlock, self.host)
            unlocked.atexit = False  # with the process all of it goes anyway
        _ALL.add(self)

    def on_device(self) -> Tensor:
        """uint8 [nbytes] of the device, over the same memory; it holds this object."""
        return torch.as_tensor(self, device=self._device) if self._device.type == "cuda" else self.host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which torch makes a tensor of it, that holds this object."""
        return {
            "shape": (self.host.numel(),), "typestr": "|u1", "data": (self.host.data_ptr(), False), "strides": None,
            "version": 3,
        }  # fmt: skip

    def holds(self, address: int) -> bool:
        """Whether it lies at this address."""
        return 0 <= address - self.host.data_ptr() < self.host.numel()


def locked_ram_of(tensor: Tensor) -> LockedRam | None:
    """What a tensor lies over; None if that is other memory."""
    address = tensor.data_ptr()
    return next((ram for ram in _ALL if ram.holds(address)), None)


def ram_to_lock() -> int:
    """Most bytes of this machine's RAM that may be locked now."""
    return int(_RAM_SHARE * free_ram())


def _locked(nbytes: int, what: str) -> Tensor:
    refused = f"{nbytes / 2**30:.2f}GiB of RAM can't be locked for the {what}"
    way_out = "Free RAM, or take a smaller --max-length; with more GPU memory (--memory) less of it is needed."
    try:
        # Not torch's, whose allocator would keep the memory. Private, as shared memory has small pages.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise UserError(f"{refused}: {error}", way_out=way_out) from None
    # Large pages are locked in a fraction of the time; a process that is forked would be given a copy of locked ones.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with suppress(AttributeError, OSError):  # a system that has no such thing
            pages.madvise(getattr(mmap, advice))
    slab = torch.frombuffer(pages, dtype=torch.uint8)
    slab.zero_()  # by all threads; the driver would ask for page after page
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(slab.data_ptr(), nbytes, 0)
    if int(status) != 0:
        raise UserError(
            f"{refused}: {runtime.cudaGetErrorString(status)}",
            rule="Layers' inputs and weights go to RAM where they don't fit the GPU beside the rest.",
            way_out=way_out,
        )
    return slab


def _unlock(slab: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(slab.data_ptr())
