"""The decoder's layers, forward and backward, written out by hand over flattened tokens.

A layer is a list of residual branches. One computes, for the stream s [T, H] (T tokens, H hidden),

    n = norm(s)      y = sum of its blocks of n      s' = carry s + scale x norm_after(y)

The base is frozen, so only adapters have weight gradients, and most intermediates are needed for nothing but dx. What a
layer keeps from its forward is its :class:`Keep` level; the rest is computed again in its backward. The sum s' is left
as the pair (what is added, s): the next norm adds it on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks import (
    AttentionBlock,
    Block,
    ExpertsBlock,
    Keep,
    Memory,
    MlpBlock,
    Pass,
    PerLayerBlock,
    RotaryTable,
    Sinks,
)
from slimtune.engine.kernels import norm
from slimtune.engine.per_layer import PerLayerComputation
from slimtune.engine.structure import Branch, Decoder, Experts, GatedMlp, Layer, PerLayerGate, Rotary, SelfAttention
from slimtune.engine.weights import Scratch

__all__ = ["Keep", "LayerComputation", "Pass", "Saved", "computations", "per_layer_inputs", "rotary_tables"]

_STREAMS = 6
"""Dropout streams that a layer has; a seventh site would share its masks with the next layer's first."""


@dataclass
class BranchSaved:
    """What a branch kept, or made anew."""

    s: Tensor
    """Its input [T, H]."""
    rstd: Tensor | None = None
    """Of the norm before; None without one, and where it is not kept."""
    inputs: tuple[Tensor, ...] | None = None
    """Each block's input buffer."""
    fresh: bool = False
    """The inputs' own columns are still to be written."""
    blocks: tuple[Any, ...] = ()
    """What each block kept."""
    y: Tensor | None = None
    """The blocks' sum, where a norm comes after it."""
    y_rstd: Tensor | None = None


@dataclass
class Saved:
    """What a layer kept."""

    keep: Keep
    branches: list[BranchSaved]
    """At :attr:`Keep.INPUT` the first one's input alone."""


class BranchComputation:
    """One residual branch."""

    def __init__(self, branch: Branch, blocks: tuple[Block, ...]) -> None:
        self.branch, self.blocks = branch, blocks
        self.adapted = any(block.trained for block in blocks)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, residual: Tensor | None, on: Pass, keep: Keep | None
    ) -> tuple[Tensor, Tensor, BranchSaved]:
        """The stream after it as a pair to be added, both [T, H], and what it kept."""
        branch = self.branch
        saved = self.enter(x, residual)
        assert saved.inputs is not None
        results = [block.forward(n, on, keep) for block, n in zip(self.blocks, saved.inputs, strict=True)]
        y = results[0][0]
        for other, _ in results[1:]:
            y.add_(other)
        kept = BranchSaved(saved.s, blocks=tuple(block for _, block in results))
        if keep is not None and keep >= Keep.ATTENTION:
            kept.rstd = saved.rstd
        if keep is not None and keep >= Keep.ALL and any(block.reads_input for block in self.blocks):
            kept.inputs = saved.inputs
        if branch.norm_after is not None:
            after = branch.norm_after
            added, _, y_rstd = norm.norm_forward(y, after.weight, after.eps, centred=after.centred)
            if keep is not None and keep >= Keep.ATTENTION:
                kept.y, kept.y_rstd = y, y_rstd
            y = added
        past = saved.s if branch.carry == 1.0 else saved.s * branch.carry
        return y if branch.scale == 1.0 else y.mul_(branch.scale), past, kept

    def enter(self, x: Tensor, residual: Tensor | None) -> BranchSaved:
        """The stream's sum, normalised into the blocks' input buffers."""
        first, over = self.blocks[0], self.branch.norm
        if over is None:
            s = x if residual is None else x + residual
            return BranchSaved(s, None, tuple(self._filled(block, s) for block in self.blocks), fresh=True)
        n, hidden = x.new_empty(x.shape[0], first.columns), x.shape[1]
        _, s, rstd = norm.norm_forward(
            x, over.weight, over.eps, residual=residual, centred=over.centred, out=n[:, :hidden]
        )
        others = (self._filled(block, n[:, :hidden]) for block in self.blocks[1:])
        return BranchSaved(s, rstd, (n, *others), fresh=True)

    @staticmethod
    def _filled(block: Block, n: Tensor) -> Tensor:
        if block.columns == n.shape[1]:
            return n
        buffer = n.new_empty(n.shape[0], block.columns)
        buffer[:, : n.shape[1]].copy_(n)
        return buffer

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward(
        self, g: Tensor, saved: BranchSaved, on: Pass, sinks: Sinks, *, need_dx: bool, own_g: bool
    ) -> Tensor | None:
        """The gradient of its input, from that of its result.

        Args:
            g: [T, H].
            saved: What the forward kept.
            on: The pass.
            sinks: Where the adapters' gradients go.
            need_dx: Without it None is returned.
            own_g: ``g`` may be overwritten.
        """
        branch = self.branch
        dy = g if branch.scale == 1.0 else g * branch.scale
        if branch.norm_after is not None:
            assert saved.y is not None
            assert saved.y_rstd is not None
            after = branch.norm_after
            dy = norm.norm_backward(dy, saved.y, after.weight, saved.y_rstd, centred=after.centred)
        kept = saved.blocks or (None,) * len(self.blocks)
        if saved.inputs is None and any(
            was is None or block.reads_input for was, block in zip(kept, self.blocks, strict=True)
        ):
            again = self.enter(saved.s, None)
            saved.inputs, saved.fresh, saved.rstd = again.inputs, True, again.rstd
        dn: Tensor | None = None
        for index, block in enumerate(self.blocks):
            n = None if saved.inputs is None else saved.inputs[index]
            d = block.backward(dy, n, kept[index], on, sinks, fresh=saved.fresh, need_dx=need_dx)
            dn = d if dn is None or d is None else dn.add_(d)
        if dn is None:
            return None
        over = branch.norm
        if branch.carry != 1.0:
            g, own_g = (g.mul_(branch.carry) if own_g else g * branch.carry), True
        if over is None:
            return dn.add_(g)
        assert saved.rstd is not None
        return norm.norm_backward(
            dn, saved.s, over.weight, saved.rstd, dresidual=g, centred=over.centred, out=g if own_g else dn
        )


class LayerComputation:
    """One decoder layer, computed for any :class:`Pass`."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device, scratch: Scratch):
        self.layer, self.dtype = layer, dtype
        branches, stream = [], _STREAMS * layer.index
        for branch in layer.branches:
            blocks: list[Block] = []
            for part in branch.blocks:
                blocks.append(_block(part, dtype, device, stream, scratch))
                stream += len(part.projections)
            branches.append(BranchComputation(branch, tuple(blocks)))
        if stream > _STREAMS * (layer.index + 1):
            raise ValueError(f"layer {layer.index} has more projections than dropout streams")
        self.branches = tuple(branches)
        self.blocks = tuple(block for branch in branches for block in branch.blocks)
        self.sites = tuple(site for block in self.blocks for site in block.sites)
        self.trained = tuple(part for block in self.blocks for part in block.trained)
        self.hidden = layer.attention.qkv.in_features

    def forward(self, x: Tensor, residual: Tensor | None, on: Pass, keep: Keep | None) -> tuple[Tensor, Tensor, Saved]:
        """The layer's result as a pair to be added, both [T, H], and what it kept.

        Args:
            x: [T, H].
            residual: [T, H] that is to be added to x first.
            on: The pass.
            keep: What to keep; None keeps nothing (evaluation).
        """
        level = keep or Keep.INPUT
        kept: list[BranchSaved] = []
        pair: tuple[Tensor, Tensor | None] = (x, residual)
        for branch in self.branches:
            y, s, saved = branch.forward(*pair, on, level)
            pair = (y, s)
            if level > Keep.INPUT or not kept:
                kept.append(saved)
        assert pair[1] is not None
        return pair[0], pair[1], Saved(level, kept)

    def backward(self, g: Tensor, saved: Saved, on: Pass, sinks: Sinks, *, need_dx: bool = True) -> Tensor | None:
        """dx [T, H] from g [T, H], the gradient of the layer's result; the adapters' gradients are added.

        Consumes ``saved``: some of its buffers are overwritten.
        """
        kept = self._again(saved.branches[0].s, on) if saved.keep == Keep.INPUT else saved.branches
        last, d = len(self.branches) - 1, g
        for index in range(last, -1, -1):
            branch, wanted = self.branches[index], need_dx or any(x.adapted for x in self.branches[:index])
            if not wanted and not branch.adapted:
                return None
            below = branch.backward(d, kept.pop(), on, sinks, need_dx=wanted, own_g=index < last)
            if below is None:
                return None
            d = below
        return d

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> tuple[object, ...]:
        """What its sizes follow from: layers of one kind have the same."""
        return tuple(block.kind for block in self.blocks)

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """Bytes that it keeps from its forward to its backward."""
        stream = memory.tokens * self.hidden * self.dtype.itemsize
        total = stream + sum(block.kept_bytes(memory, keep) for block in self.blocks)
        if keep >= Keep.ATTENTION:
            for index, branch in enumerate(self.branches):
                total += stream * (index > 0) + 4 * memory.tokens * (branch.branch.norm is not None)
                total += (stream + 4 * memory.tokens) * (branch.branch.norm_after is not None)
        return total

    def working_bytes(self, memory: Memory) -> int:
        """Bytes that its backward takes at its peak beside what was kept, all of it computed again."""
        stream = memory.tokens * self.hidden * self.dtype.itemsize
        inputs = sum(block.columns for block in self.blocks[:-1]) * memory.tokens * self.dtype.itemsize
        after = 2 * stream * any(branch.branch.norm_after is not None for branch in self.branches)
        carried = stream * any(branch.branch.carry != 1.0 for branch in self.branches)
        work = max(block.working_bytes(memory) for block in self.blocks)
        return self.kept_bytes(memory, Keep.ATTENTION) + inputs + 2 * stream + after + carried + work

    def _again(self, x: Tensor, on: Pass) -> list[BranchSaved]:
        """What the layer keeps at :attr:`Keep.ALL`, but for the last branch: its blocks compute again by themselves."""
        kept: list[BranchSaved] = []
        pair: tuple[Tensor, Tensor | None] = (x, None)
        for branch in self.branches[:-1]:
            y, s, saved = branch.forward(*pair, on, Keep.ALL)
            pair = (y, s)
            kept.append(saved)
        last = self.branches[-1]
        if last.branch.norm_after is None:
            return [*kept, last.enter(*pair)]
        return [*kept, last.forward(*pair, on, Keep.ATTENTION)[2]]


def _block(
    part: SelfAttention | GatedMlp | Experts | PerLayerGate,
    dtype: torch.dtype,
    device: torch.device,
    stream: int,
    scratch: Scratch,
) -> Block:
    if isinstance(part, SelfAttention):
        return AttentionBlock(part, dtype, device, stream, scratch)
    if isinstance(part, PerLayerGate):
        return PerLayerBlock(part, dtype, device, stream, scratch)
    if isinstance(part, Experts):
        return ExpertsBlock(part, dtype, device, scratch)
    return MlpBlock(part, dtype, device, stream, scratch)


def computations(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> list[LayerComputation | None]:
    """One for each layer of the model; None where the layer can't be fused."""
    scratch = Scratch()
    return [None if layer is None else LayerComputation(layer, dtype, device, scratch) for layer in decoder.layers]


def per_layer_inputs(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> PerLayerComputation | None:
    """What makes the layers' inputs beside the stream, where they have any."""
    part = decoder.per_layer
    return None if part is None else PerLayerComputation(part, dtype, device, _STREAMS * len(decoder.layers))


def rotary_tables(
    decoder: Decoder, positions: int, device: torch.device, dtype: torch.dtype
) -> dict[Rotary, RotaryTable]:
    """The table of every rotary embedding that a layer has."""
    parts = [layer.attention for layer in decoder.fused]
    sizes = {part.rotary: part.head_dim for part in parts if part.rotary is not None}
    return {rotary: RotaryTable.of(rotary, dim, positions, device, dtype) for rotary, dim in sizes.items()}
