"""A place on the device for each layer's 4-bit bytes, made before the first weight is read.

A weight is read in 16 bits, packed, and let go of. Packed tensors that are made meanwhile settle in the holes, and none
of the memory around them can be given back or take anything large: a step within a budget then has no room, though
most of it is free. So the packed bytes are copied to where they stay, and what was only passing is free as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.stored import places_of, views_over, whole_bytes

__all__ = ["Shelves", "layer_of"]

_LAYER = re.compile(r"(.*?\.\d+)\.")


class Shelves:
    """Memory for parameters that are to come.

    Args:
        sizes: Bytes of each of the tensors that hold most of a parameter, by its name.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]]) -> None:
        self._sizes = dict(sizes)
        self._free: dict[str, Tensor] = {}

    def place(self, name: str, parameter: Any) -> None:
        """Move a parameter's bytes to its layer's memory; one that isn't expected so stays where it is."""
        places = places_of(parameter)
        tensors = [place.tensor for place in places]
        if tuple(self._sizes.get(name, ())) != tuple(tensor.nbytes for tensor in tensors):
            return
        if not self._free:
            self._make(tensors[0].device)
        del self._sizes[name]
        layer, size = layer_of(name), sum(whole_bytes(tensor.nbytes) for tensor in tensors)
        for place, tensor, view in zip(places, tensors, views_over(self._free[layer][:size], tensors), strict=True):
            view.copy_(tensor)
            place.put(view)
        self._free[layer] = self._free[layer][size:]

    def _make(self, device: torch.device) -> None:
        """A block for each layer, so that one which leaves the device later gives its memory back."""
        totals: dict[str, int] = {}
        for name, sizes in self._sizes.items():
            totals[layer_of(name)] = totals.get(layer_of(name), 0) + sum(map(whole_bytes, sizes))
        self._free = {layer: torch.empty(total, dtype=torch.uint8, device=device) for layer, total in totals.items()}


def layer_of(name: str) -> str:
    """The layer of a parameter, by its name; its own name where it is in none."""
    found = _LAYER.match(name)
    return name if found is None else found[1]
