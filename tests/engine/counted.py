"""What a step allocates, counted on a CPU."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimtune.engine import Engine
from tests.engine import models


class Counted(TorchDispatchMode):
    """The most bytes that tensors take at once, those that a kernel's specification makes for itself left out: it
    stands for a kernel, which makes none. Memory that is there before is not counted."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        frame: Any = sys._getframe()
        while frame is not None:
            if "engine/kernels/" in frame.f_code.co_filename:
                return made
            frame = frame.f_back
        for leaf in tree_leaves((args, kwargs, made)):  # a kernel's result is seen where it is used
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def seen(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, with its results counted where it is called: what goes from one kernel to the next is used in none
    of our own operations."""

    def called(*args: Any, **options: Any) -> Any:
        made = kernel(*args, **options)
        for leaf in tree_leaves(made):
            leaf.view_as(leaf)
        return made

    return called


def most_of_a_step(model: nn.Module, engine: Engine, *, tokens: int, beside: Iterable[Tensor] = ()) -> int:
    """The most bytes that a step takes, the model, its adapters' sums and the engine's inputs not among them.

    Args:
        model: With adapters.
        engine: The model's.
        tokens: Of one document.
        beside: What isn't counted either.
    """
    ids = torch.randint(0, models.VOCABULARY, (1, tokens))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens)[None]}
    engine.forward_backward(batch, tokens)
    inputs, tables = engine._inputs, engine._tables.values()
    before = [
        *model.parameters(), *model.buffers(), engine.flat.data, engine.flat.grad, engine._sums, engine._head,
        inputs._fixed, inputs._boundaries, *(x for table in tables for x in (table.cos, table.sin)), *beside,
    ]  # fmt: skip
    if engine._away is not None:
        before += engine._away._places.values()
    if engine._streamed is not None:
        before += [x for homes in engine._streamed._homes.values() for x in homes]
        before += engine._streamed._buffers
    with Counted(before) as counted:
        engine.forward_backward(batch, tokens)
    return counted.most
