"""Frozen weights of some layers in page-locked RAM, brought to the device a layer ahead, in forward and backward.

A layer's bytes in 4 bits take less time over the bus than a few thousand tokens take in it, so a card needs to hold no
more of them than two such layers: the one that computes and the next. The modules of a streamed layer hold tensors in
RAM, and views of a buffer on the device while that holds the layer's bytes. They are the same bytes, so a step computes
the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.engine.decoder import LayerComputation
from slimtune.engine.offload import Copies, copies_on, ram_slab
from slimtune.engine.weights import Place, whole_bytes

__all__ = ["StreamedWeights", "make_resident"]

_BUFFERS = 2
"""One is read while the other is written."""


class StreamedWeights:
    """Weights of some layers, in RAM.

    Args:
        layers: The layers, by their numbers; their weights are moved to RAM from wherever they are.
        device: Where they compute.

    Raises:
        UserError: The system gives no such memory, or doesn't lock it. Nothing has been moved then.

    Attributes:
        nbytes: Of RAM that are locked.
        copies: What brings them.
    """

    def __init__(self, layers: Mapping[int, LayerComputation], device: torch.device) -> None:
        self._device, self._numbers = device, sorted(layers)
        places = {number: layers[number].places for number in self._numbers}
        sizes = {number: layers[number].stored_bytes for number in self._numbers}
        self.nbytes = sum(sizes.values())
        slab = ram_slab(self, self.nbytes, device, "layers' weights")
        self._homes = dict(zip(self._numbers, torch.split(slab, list(sizes.values())), strict=True))
        largest = max(sizes.values())
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        self._places: dict[int, list[Place]] = places
        self._at_home: dict[int, list[Tensor]] = {}
        self._in_buffer: dict[int, list[list[Tensor]]] = {}
        for number in self._numbers:
            tensors = [place.tensor for place in places[number]]
            self._in_buffer[number] = [_views(buffer, tensors) for buffer in self._buffers]
            self._at_home[number] = _views(self._homes[number], tensors)
            for place, tensor, home in zip(places[number], tensors, self._at_home[number], strict=True):
                home.copy_(tensor)
                place.put(home)
            _lend_to(layers[number].layer.module, self, number)
        self._holds: list[int | None] = [None] * _BUFFERS
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._lent: set[int] = set()
        self.copies: Copies = copies_on(device)

    def __contains__(self, layer: int) -> bool:
        return layer in self._homes

    def begin(self) -> None:
        """A pass of the engine's begins: what was lent to the layers' own forward is given back."""
        for number in tuple(self._lent):
            self.restore(number)

    def take(self, layer: int, *, step: int) -> None:
        """Before a layer is given to compute: its weights are there, and the next streamed layer's on their way.

        Args:
            layer: The layer's number; one that isn't streamed has its weights anyway.
            step: 1: the layers follow each other up, as in a forward; -1: down.
        """
        if layer not in self:
            return
        self._fetch(layer, None)
        self._wait(layer)
        self.restore(layer)
        following = self._numbers.index(layer) + step
        if 0 <= following < len(self._numbers):
            # Whatever reads the buffer that it goes to was given to compute before, so the copy begins behind it.
            self._fetch(self._numbers[following], layer)

    def lend(self, layer: int, *, gradients: bool) -> None:
        """As :meth:`take`, for the layer's own forward.

        Args:
            layer: The layer's number.
            gradients: Autograd will read the weights once more, later: they get memory of their own until the engine's
                next pass begins.
        """
        if layer in self._lent:
            return
        if not gradients:
            self.take(layer, step=1)
            return
        self._put(layer, [home.to(self._device, copy=True) for home in self._at_home[layer]])
        self._lent.add(layer)

    def restore(self, layer: int) -> None:
        """Let a layer's modules hold what is its own: a buffer's views while it has its bytes, or RAM."""
        self._lent.discard(layer)
        at_home = layer not in self._holds or layer in self._coming
        self._put(layer, self._at_home[layer] if at_home else self._in_buffer[layer][self._holds.index(layer)])

    def _put(self, layer: int, tensors: Sequence[Tensor]) -> None:
        for place, tensor in zip(self._places[layer], tensors, strict=True):
            place.put(tensor)

    def _wait(self, layer: int) -> None:
        if layer in self._coming:
            self.copies.wait(self._coming[layer][1])
            del self._coming[layer]

    def _fetch(self, layer: int, computing: int | None) -> None:
        """Bring a layer, unless it is there, to a buffer that holds no layer that computes."""
        if layer in self._holds:
            return
        buffer = next(index for index in range(_BUFFERS) if computing is None or self._holds[index] != computing)
        before = self._holds[buffer]
        self._holds[buffer] = None
        if before is not None:
            self._wait(before)  # if its pass broke off
            if before not in self._lent:  # else autograd reads that
                self.restore(before)
        self._holds[buffer] = layer
        home = self._homes[layer]
        target = self._buffers[buffer][: home.numel()]
        self._coming[layer] = target, self.copies.begin(target, home)


def make_resident(layer: LayerComputation, device: torch.device) -> None:
    """Bring a layer's weights to the device for good, from RAM where an engine before this one left them."""
    module: Any = layer.layer.module
    if issubclass(type(module), _Streamed):
        for place in layer.places:
            place.put(place.tensor.to(device, copy=True))
        module.__class__ = type(module).plain
        del module.streamed


class _Streamed(nn.Module):
    """A decoder layer's own class on top of this: its forward finds its weights, whoever calls it."""

    plain: type[nn.Module]
    streamed: tuple[StreamedWeights, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        store, number = self.streamed
        store.lend(number, gradients=torch.is_grad_enabled() and self._has_gradients(args, kwargs))
        return super().forward(*args, **kwargs)

    def _has_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = (*args, *kwargs.values(), *self.parameters())
        return any(isinstance(each, Tensor) and each.requires_grad for each in given)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """A trainer moves its model to the device when training begins: the layer's weights are brought back."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        store, number = self.streamed
        store.restore(number)
        return self


def _lend_to(module: Any, store: StreamedWeights, number: int) -> None:
    if not issubclass(type(module), _Streamed):
        kind = type(module)
        # Of the same name and home: who looks at a model's classes sees Transformers'.
        module.__class__ = type(kind.__name__, (_Streamed, kind), {"__module__": kind.__module__, "plain": kind})
    module.streamed = store, number


def _views(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors as these over uint8 memory, one behind the other."""
    made, at = [], 0
    for tensor in like:
        made.append(memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += whole_bytes(tensor.nbytes)
    return made
