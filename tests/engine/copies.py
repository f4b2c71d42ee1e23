"""Copies beside what computes, as late as they may be: what is read, written or given away too early is found out."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class _Copy:
    target: weakref.ref[Tensor]
    source: weakref.ref[Tensor]
    memory: tuple[StorageWeakRef, StorageWeakRef]
    before: Tensor


class LateCopies:
    """Copies that are done when they are waited for and no earlier, as they may be beside a GPU that is busy.

    Until then the target holds nothing, and both sides must stay: memory that nobody holds is the next tensor's.
    """

    def __init__(self) -> None:
        self.begun, self.done = 0, 0

    def begin(self, target: Tensor, source: Tensor) -> _Copy:
        before = source.clone()
        target.fill_(math.nan if target.is_floating_point() else 255)
        self.begun += 1
        storages = StorageWeakRef(target.untyped_storage()), StorageWeakRef(source.untyped_storage())
        return _Copy(weakref.ref(target), weakref.ref(source), storages, before)

    def wait(self, copied: _Copy) -> None:
        assert not any(memory.expired() for memory in copied.memory), "given away under a copy"
        target, source = copied.target(), copied.source()
        assert source is None or torch.equal(source, copied.before), "written under a copy"
        if target is not None:  # else nobody will read it: its pass broke off
            target.copy_(copied.before)
        self.done += 1
