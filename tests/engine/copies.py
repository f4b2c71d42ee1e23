"""Copies beside what computes, as late as they may be: what is read, written or given away too early is found out."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
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

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Copy]:
        copies = []
        for target, source in pairs:
            before = source.clone()
            target.fill_(math.nan if target.is_floating_point() else 255)
            storages = StorageWeakRef(target.untyped_storage()), StorageWeakRef(source.untyped_storage())
            copies.append(_Copy(weakref.ref(target), weakref.ref(source), storages, before))
        self.begun += 1
        return copies

    def wait(self, copied: list[_Copy]) -> None:
        for each in copied:
            assert not any(memory.expired() for memory in each.memory), "given away under a copy"
            target, source = each.target(), each.source()
            assert source is None or torch.equal(source, each.before), "written under a copy"
            if target is not None:  # else nobody will read it: its pass broke off
                target.copy_(each.before)
        self.done += 1
