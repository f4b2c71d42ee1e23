"""The decoder's layers, forward and backward, written out by hand over flattened tokens.

A layer is a list of residual branches. One computes, for the stream s [T, H] (T tokens, H hidden),

    n = norm(s)      y = sum of its blocks of n      s' = carry s + scale x norm_after(y)

The base is frozen, so only adapters have weight gradients, and most intermediates are needed for nothing but dx. What a
layer keeps from its forward is its :class:`Keep` level; the rest is computed again in its backward. The sum s' is left
as the pair (what is added, s): the next norm adds it on its way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks import (
    AttentionBlock,
    Block,
    BranchBlock,
    BranchComputation,
    BranchSaved,
    DeltaBlock,
    ExpertsBlock,
    Keep,
    Memory,
    MlpBlock,
    Pass,
    PerLayerBlock,
    RotaryTable,
    Sinks,
)
from slimtune.engine.per_layer import PerLayerComputation
from slimtune.engine.stored import Place, places_of, whole_bytes
from slimtune.engine.structure import (
    Branch,
    Decoder,
    Experts,
    GatedDelta,
    Layer,
    Part,
    PerLayerGate,
    Rotary,
    SelfAttention,
)
from slimtune.engine.weights import Scratch

__all__ = [
    "Keep",
    "LayerComputation",
    "Pass",
    "Saved",
    "computations",
    "lowest_trained",
    "per_layer_inputs",
    "rotary_tables",
]

_STREAMS = 4
"""Dropout streams that a layer has at least; the masks of a run that is resumed follow from their numbers."""


@dataclass
class Saved:
    """What a layer kept."""

    keep: Keep
    branches: list[BranchSaved]
    """Below :attr:`Keep.ATTENTION` the first one's input alone."""
    made: list[tuple[Any, ...]]
    """What each branch's blocks kept below that."""


class LayerComputation:
    """One decoder layer, computed for any :class:`Pass`."""

    def __init__(
        self, layer: Layer, dtype: torch.dtype, device: torch.device, scratch: Scratch, first_stream: int
    ) -> None:
        self.layer, self.dtype = layer, dtype
        self.hidden, stream = layer.hidden, itertools.count(first_stream)

        def computed(branch: Branch) -> BranchComputation:
            blocks = (
                BranchBlock(computed(part))
                if isinstance(part, Branch)
                else _block(part, dtype, device, stream, scratch)
                for part in branch.blocks
            )
            return BranchComputation(branch, tuple(blocks), self.hidden, dtype)

        self.branches = tuple(computed(branch) for branch in layer.branches)
        self.blocks = tuple(block for branch in self.branches for block in branch.blocks)
        self.sites = tuple(site for block in self.blocks for site in block.sites)
        self.trained = tuple(part for block in self.blocks for part in block.trained)

    def forward(
        self, stream: list[Tensor], on: Pass, keep: Keep | None, *, own: bool = False
    ) -> tuple[list[Tensor], Saved]:
        """The layer's result as a pair to be added, both [T, H], and what it kept.

        Args:
            stream: One tensor [T, H], or two that are to be added first.
            on: The pass.
            keep: What to keep; None keeps nothing (evaluation).
            own: The tensors are given up: the first may be overwritten, and the list is emptied.
        """
        level = keep or Keep.INPUT
        kept: list[BranchSaved] = []
        made: list[tuple[Any, ...]] = []
        for index, branch in enumerate(self.branches):
            stream, saved = branch.forward(stream, on, level, own=own or index > 0)
            if level < Keep.ATTENTION:
                made.append(saved.blocks)
                saved.blocks = ()
            if level >= Keep.ATTENTION or not kept:
                kept.append(saved)
        return stream, Saved(level, kept, made)

    def backward(
        self, g: Tensor, saved: Saved, on: Pass, sinks: Sinks, *, need_dx: bool = True, own_g: bool = False
    ) -> Tensor | None:
        """dx [T, H] from g [T, H], the gradient of the layer's result; the adapters' gradients are added.

        Consumes ``saved``: some of its buffers are overwritten. So may be g, if it is given up (``own_g``).
        """
        kept = self._again(saved, on) if saved.keep < Keep.ATTENTION else saved.branches
        last, d = len(self.branches) - 1, g
        for index in range(last, -1, -1):
            branch, wanted = self.branches[index], need_dx or any(x.adapted for x in self.branches[:index])
            if not wanted and not branch.adapted:
                return None
            below = branch.backward(d, kept.pop(), on, sinks, need_dx=wanted, own_g=own_g or index < last)
            if below is None:
                return None
            d = below
        return d

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def places(self) -> list[Place]:
        """Where its frozen matrices are held, as they are stored."""
        return [place for weight in self.weights for place in places_of(weight)]

    @property
    def weights(self) -> list[Any]:
        """The parameters of its frozen matrices."""
        return [weight for block in self.blocks for part in block.parts for weight in part.weights]

    @property
    def stored_bytes(self) -> int:
        """What those take, one behind the other."""
        return sum(whole_bytes(place.tensor.nbytes) for place in self.places)

    @property
    def kind(self) -> tuple[object, ...]:
        """What its sizes follow from: layers of one kind have the same."""
        return tuple(block.kind for block in self.blocks)

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """Bytes that it keeps from its forward to its backward."""
        streams = len(self.branches) if keep >= Keep.ATTENTION else 1
        stream = memory.tokens * self.hidden * self.dtype.itemsize
        return streams * stream + sum(branch.kept_bytes(memory, keep) for branch in self.branches)

    def working_bytes(self, memory: Memory) -> int:
        """Bytes that its backward takes at its peak beside what was kept, all of it computed again."""
        stream = memory.tokens * self.hidden * self.dtype.itemsize
        held, most, last = stream, 0, self.blocks[-1]  # the gradient that runs through
        for branch in self.branches:
            held += stream + branch.kept_bytes(memory, Keep.ATTENTION)
            # The last block counts its own.
            inputs = sum(block.columns for block in branch.blocks if block is not last) * stream // self.hidden
            most = max(most, held + inputs + branch.working_bytes(memory))
            held += 0 if memory.sparing else inputs
        return most

    def _again(self, saved: Saved, on: Pass) -> list[BranchSaved]:
        """What the layer keeps at :attr:`Keep.ALL`, but for the last branch: its blocks compute again by themselves."""
        kept: list[BranchSaved] = []
        stream = [saved.branches[0].s]
        for index, branch in enumerate(self.branches[:-1]):
            stream, again = branch.forward(stream, on, Keep.ALL, own=index > 0, made=saved.made[index])
            if on.sparing:
                again.inputs = None
            kept.append(again)
        return [*kept, self.branches[-1].again(stream, on, own=bool(kept), made=saved.made[-1])]


def _block(
    part: Part,
    dtype: torch.dtype,
    device: torch.device,
    streams: Iterator[int],
    scratch: Scratch,
) -> Block:
    if isinstance(part, Experts):
        return ExpertsBlock(part, dtype, device, scratch)
    stream, _ = next(streams), next(streams)  # one for each of two projections
    if isinstance(part, SelfAttention):
        return AttentionBlock(part, dtype, device, stream, scratch)
    if isinstance(part, GatedDelta):
        return DeltaBlock(part, dtype, device, stream, scratch)
    if isinstance(part, PerLayerGate):
        return PerLayerBlock(part, dtype, device, stream, scratch)
    return MlpBlock(part, dtype, device, stream, scratch)


def computations(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> list[LayerComputation | None]:
    """One for each layer of the model; None where the layer can't be fused."""
    scratch = Scratch()
    streams = _streams(decoder)
    return [
        None if layer is None else LayerComputation(layer, dtype, device, scratch, streams * layer.index)
        for layer in decoder.layers
    ]


def lowest_trained(layers: Sequence[LayerComputation], per_layer: PerLayerComputation | None) -> int:
    """The first layer that has a backward: of the lowest adapter."""
    # What is beside the stream reaches every layer, so its adapter's gradient comes from all of them.
    if per_layer is not None and per_layer.trained:
        return 0
    return next(index for index, layer in enumerate(layers) if layer.trained)


def _streams(decoder: Decoder) -> int:
    """Dropout streams of each layer: one more site would share its masks with the next layer's first."""
    return max(_STREAMS, *(len(layer.projections) for layer in decoder.fused))


def per_layer_inputs(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> PerLayerComputation | None:
    """What makes the layers' inputs beside the stream, where they have any."""
    part = decoder.per_layer
    return None if part is None else PerLayerComputation(part, dtype, device, _streams(decoder) * len(decoder.layers))


def rotary_tables(
    decoder: Decoder, positions: int, device: torch.device, dtype: torch.dtype
) -> dict[Rotary, RotaryTable]:
    """The table of every rotary embedding that a layer has."""
    sizes = {part.rotary: part.head_dim for part in decoder.attentions if part.rotary is not None}
    return {rotary: RotaryTable.of(rotary, dim, positions, device, dtype) for rotary, dim in sizes.items()}
