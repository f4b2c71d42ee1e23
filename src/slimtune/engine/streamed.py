"""Frozen weights of some layers in page-locked RAM, brought to the device a layer ahead, in forward and backward.

A layer's bytes in 4 bits take less time over the bus than a few thousand tokens take in it, so a card needs to hold no
more of them than two such layers: the one that computes and the next. The modules of a streamed layer hold tensors over
that RAM, which the device reads too, only slowly: whoever else calls the model finds it whole. While a buffer on the
device holds the layer's bytes they hold views of it. They are the same bytes, so a step computes the same to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.decoder import LayerComputation
from slimtune.engine.offload import Copies, copies_on
from slimtune.engine.ram import LockedRam, host_of, keep_there
from slimtune.engine.stored import Place, views_over, whole_bytes
from slimtune.engine.structure import Decoder
from slimtune.ranks.host import here

__all__ = ["StreamedWeights", "embedding_places", "in_ram", "make_resident", "move_to_ram"]

_BUFFERS = 2
"""One is read while the other is written."""
_STORES: weakref.WeakSet[StreamedWeights] = weakref.WeakSet()


class StreamedWeights:
    """Weights of some layers, in RAM.

    Args:
        layers: The layers, by their numbers; their weights are moved to RAM, unless they are there.
        device: Where they compute.

    Raises:
        UserError: The system gives no such memory, or doesn't lock it.

    Attributes:
        copies: What brings them.
    """

    def __init__(self, layers: Mapping[int, LayerComputation], device: torch.device) -> None:
        self._numbers = sorted(layers)
        self._places: dict[int, list[Place]] = {number: layers[number].places for number in self._numbers}
        largest = max(layers[number].stored_bytes for number in self._numbers)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        self._at_home: dict[int, list[Tensor]] = {}
        self._homes: dict[int, list[Tensor]] = {}
        self._in_buffer: dict[int, list[list[Tensor]]] = {}
        for number, places in self._places.items():
            move_to_ram(places, device, "layers' weights")
            self._at_home[number] = [place.tensor for place in places]
            self._homes[number] = [home for each in self._at_home[number] if (home := host_of(each)) is not None]
            self._in_buffer[number] = [views_over(buffer, self._at_home[number]) for buffer in self._buffers]
        self._holds: list[int | None] = [None] * _BUFFERS
        self._coming: dict[int, Any] = {}
        self.copies: Copies = copies_on(device)
        _STORES.add(self)

    def __contains__(self, layer: int) -> bool:
        return layer in self._places

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
        self._put(layer, self._in_buffer[layer][self._holds.index(layer)])
        following = self._numbers.index(layer) + step
        if 0 <= following < len(self._numbers):
            # Whatever reads the buffer that it goes to was given to compute before, so the copy begins behind it.
            self._fetch(self._numbers[following], layer)

    def holds(self, address: int) -> bool:
        """Whether a buffer lies at this address."""
        return any(0 <= address - buffer.data_ptr() < buffer.numel() for buffer in self._buffers)

    def _put(self, layer: int, tensors: Sequence[Tensor]) -> None:
        for place, tensor in zip(self._places[layer], tensors, strict=True):
            place.put(tensor)

    def _wait(self, layer: int) -> None:
        if layer in self._coming:
            self.copies.wait(self._coming[layer])
            del self._coming[layer]

    def _fetch(self, layer: int, computing: int | None) -> None:
        """Bring a layer, unless it is there, to a buffer that holds no layer that computes."""
        if layer in self._holds:
            return
        buffer = next(index for index in range(_BUFFERS) if computing is None or self._holds[index] != computing)
        before = self._holds[buffer]
        if before is not None:
            self._wait(before)  # if its pass broke off
            self._put(before, self._at_home[before])
        self._holds[buffer] = layer
        targets = self._in_buffer[layer][buffer]
        self._coming[layer] = self.copies.begin(list(zip(targets, self._homes[layer], strict=True)))


def embedding_places(decoder: Decoder) -> list[Place]:
    """Where the embedding is held; nowhere if it is the head too, of which every row is read."""
    weight = decoder.model.get_input_embeddings().weight
    return [] if weight is decoder.head else [Place(weight, "data")]


def in_ram(places: Sequence[Place]) -> int:
    """Bytes of what is held there that lie in locked RAM."""
    return sum(place.tensor.nbytes for place in places if host_of(place.tensor) is not None)


def move_to_ram(places: Sequence[Place], device: torch.device, what: str) -> None:
    """Move what is held there to locked RAM, one tensor behind the other, unless it is there already. The ranks of one
    host have it there once.

    Raises:
        UserError: The system gives no such memory, or doesn't lock it; or a rank of this host holds other bytes.
    """
    tensors = [place.tensor for place in places]
    if all(host_of(tensor) is not None for tensor in tensors):
        return
    nbytes = sum(whole_bytes(tensor.nbytes) for tensor in tensors)
    with here().common(nbytes, what) as (memory, writes):
        ram = LockedRam(nbytes, device, what, memory)
        hosts, homes = views_over(ram.host, tensors), views_over(ram.on_device(), tensors)
        for place, tensor, host, home in zip(places, tensors, hosts, homes, strict=True):
            keep_there(tensor, host, what, writes=writes)
            place.put(home)


def make_resident(places: Sequence[Place]) -> None:
    """Bring to the device for good what an engine before this one left in RAM, or in a buffer of its own."""
    for place in places:
        tensor = place.tensor
        if host_of(tensor) is not None or any(store.holds(tensor.data_ptr()) for store in _STORES):
            place.put(tensor.clone())
