"""A residual branch: s' = carry s + scale x norm_after(sum of its blocks of norm(s)), forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks.block import Block, Keep, Memory, Pass, Pays, Sinks
from slimtune.engine.fp8 import Fp8
from slimtune.engine.kernels import norm
from slimtune.engine.structure import Branch

__all__ = ["BranchBlock", "BranchComputation", "BranchSaved"]


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


class BranchComputation:
    """One residual branch."""

    def __init__(self, branch: Branch, blocks: tuple[Block, ...], hidden: int, dtype: torch.dtype) -> None:
        self.branch, self.blocks, self.hidden, self.dtype = branch, blocks, hidden, dtype
        self.adapted = any(block.trained for block in blocks)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        stream: list[Tensor],
        on: Pass,
        keep: Keep | None,
        *,
        own: bool = False,
        made: Sequence[Any] = (),
    ) -> tuple[list[Tensor], BranchSaved]:
        """The stream after it as a pair to be added, both [T, H], and what it kept.

        Args:
            stream: One tensor [T, H], or two that are to be added first.
            on: The pass.
            keep: What to keep; None: there will be no backward.
            own: As :meth:`enter` has it.
            made: What each block kept at :attr:`Keep.ATTENDED`, where it computes again.
        """
        branch = self.branch
        saved = self.enter(stream, own=own)
        assert saved.inputs is not None
        results = [
            block.forward(n, on, keep) if keep is None or was is None else block.again(n, on, keep, was)
            for block, n, was in zip(self.blocks, saved.inputs, made or (None,) * len(self.blocks), strict=True)
        ]
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
        past = saved.s if branch.carry is None or branch.carry == 1.0 else saved.s * branch.carry
        return [y if branch.scale == 1.0 else y.mul_(branch.scale), past], kept

    def enter(self, stream: list[Tensor], *, own: bool = False) -> BranchSaved:
        """The stream's sum, normalised into the blocks' input buffers.

        If its tensors are given up (``own``) the sum takes the first one's place, and the list is emptied: nobody holds
        the second one while the blocks compute.
        """
        x, residual = stream[0], stream[1] if len(stream) > 1 else None
        if own:
            stream.clear()
        first, over = self.blocks[0], self.branch.norm
        if over is None:
            s = x if residual is None else torch.add(x, residual, out=x if own else None)
            return BranchSaved(s, None, tuple(self._filled(block, s) for block in self.blocks), fresh=True)
        n, hidden = x.new_empty(x.shape[0], first.columns), x.shape[1]
        _, s, rstd = norm.norm_forward(
            x, over.weight, over.eps, residual=residual, centred=over.centred, out=n[:, :hidden],
            out_sum=x if own else None,
        )  # fmt: skip
        others = (self._filled(block, n[:, :hidden]) for block in self.blocks[1:])
        return BranchSaved(s, rstd, (n, *others), fresh=True)

    def again(self, stream: list[Tensor], on: Pass, *, own: bool = False, made: Sequence[Any] = ()) -> BranchSaved:
        """What the backward needs that nothing was kept for; the blocks compute again by themselves, but for what they
        have ``made``."""
        if self.branch.norm_after is None:
            saved = self.enter(stream, own=own)
            saved.blocks = tuple(made)
            return saved
        return self.forward(stream, on, Keep.ATTENTION, own=own, made=made)[1]

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
            again = self.enter([saved.s])
            saved.inputs, saved.fresh, saved.rstd = again.inputs, True, again.rstd
        dn: Tensor | None = None
        for index, block in enumerate(self.blocks):
            n = None if saved.inputs is None else saved.inputs[index]
            d = block.backward(dy, n, kept[index], on, sinks, fresh=saved.fresh, need_dx=need_dx)
            dn = d if dn is None or d is None else dn.add_(d)
        if dn is None:
            return None
        over, past = branch.norm, None if branch.carry is None else g
        if branch.carry is not None and branch.carry != 1.0:
            past, own_g = (g.mul_(branch.carry) if own_g else g * branch.carry), True
        if over is None:
            return dn if past is None else dn.add_(past)
        assert saved.rstd is not None
        out = past if past is not None and own_g else dn
        return norm.norm_backward(dn, saved.s, over.weight, saved.rstd, dresidual=past, centred=over.centred, out=out)

    # -- sizes --------------------------------------------------------------------------------------------------------

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """Bytes that it keeps, its input [T, H] not among them."""
        total = sum(block.kept_bytes(memory, keep) for block in self.blocks)
        if keep >= Keep.ATTENTION:
            total += 4 * memory.tokens * (self.branch.norm is not None)
            total += (self.stream(memory) + 4 * memory.tokens) * (self.branch.norm_after is not None)
        if keep >= Keep.ALL and any(block.reads_input for block in self.blocks):
            # A block without columns of its own takes what there is; a norm writes the first one's.
            normed = self.branch.norm is not None
            columns = (
                block.columns
                for index, block in enumerate(self.blocks)
                if block.columns > self.hidden or (normed and index == 0)
            )
            total += sum(columns) * memory.tokens * self.dtype.itemsize
        return total

    def stream(self, memory: Memory) -> int:
        """Bytes of [T, H]."""
        return memory.tokens * self.hidden * self.dtype.itemsize

    def working_bytes(self, memory: Memory) -> int:
        """Bytes that its backward takes beside what it keeps at :attr:`Keep.ATTENTION` and two streams."""
        after = 2 * self.stream(memory) * (self.branch.norm_after is not None)
        carried = self.stream(memory) * (self.branch.carry not in (None, 1.0))
        return after + carried + max(block.working_bytes(memory) for block in self.blocks)


class BranchBlock(Block):
    """A branch as a block of another one that has no norm before: with norms of its own, and no stream past it."""

    def __init__(self, inner: BranchComputation) -> None:
        self.inner = inner
        self.sites = tuple(site for block in inner.blocks for site in block.sites)
        self.stacks = tuple(stack for block in inner.blocks for stack in block.stacks)

    def use_fp8(self, pays: Pays, tokens: int, switch: Fp8 | None) -> None:
        """See :meth:`Block.use_fp8`."""
        for block in self.inner.blocks:
            block.use_fp8(pays, tokens, switch)

    @property
    def fp8_products(self) -> float:
        """See :attr:`Block.fp8_products`."""
        return sum(block.fp8_products for block in self.inner.blocks)

    @property
    def in_16_bits(self) -> str:
        """See :attr:`Block.in_16_bits`."""
        return next((block.in_16_bits for block in self.inner.blocks if block.in_16_bits), "")

    @property
    def columns(self) -> int:
        """H."""
        return self.inner.hidden

    @property
    def reads_input(self) -> bool:
        """Never: what it keeps holds it."""
        return False

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        stream, kept = self.inner.forward([n], on, keep)
        return stream[0], kept if keep is not None and keep >= Keep.ATTENTION else None

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`."""
        if kept is None:
            assert n is not None
            kept = self.inner.again([n], on)
        return self.inner.backward(dy, kept, on, sinks, need_dx=need_dx, own_g=False)

    # -- sizes ----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> tuple[object, ...]:
        """See :attr:`Block.kind`."""
        return type(self), *(block.kind for block in self.inner.blocks)

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """See :meth:`Block.kept_bytes`."""
        return self.inner.kept_bytes(memory, keep) if keep >= Keep.ATTENTION else 0

    def working_bytes(self, memory: Memory) -> int:
        """See :meth:`Block.working_bytes`."""
        columns = sum(block.columns for block in self.inner.blocks)
        return self.inner.working_bytes(memory) + columns * memory.tokens * self.inner.dtype.itemsize

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        return min(block.rows(memory) for block in self.inner.blocks)

    def chunks(self, memory: Memory) -> int:
        """See :meth:`Block.chunks`."""
        return max(block.chunks(memory) for block in self.inner.blocks)

    @property
    def adapted_columns(self) -> int:
        """See :attr:`Block.adapted_columns`."""
        return sum(block.adapted_columns for block in self.inner.blocks)

    @property
    def products(self) -> float:
        """See :attr:`Block.products`."""
        return sum(block.products for block in self.inner.blocks)

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        return sum(block.products_again(keep) for block in self.inner.blocks)
