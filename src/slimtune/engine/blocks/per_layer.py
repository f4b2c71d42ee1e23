"""What a token brings to each layer beside the stream: y = projection(act(gate(n)) x p), p [T, P] the layer's own.

p is lent by :class:`slimtune.engine.per_layer.PerLayerComputation` for all layers at once. No other layer reads this
one's part, so its gradient is left in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks.block import Keep, Memory, Pass, Sinks, TwoProjections
from slimtune.engine.kernels import mlp
from slimtune.engine.structure import PerLayerGate
from slimtune.engine.weights import Scratch

__all__ = ["PER_LAYER", "PerLayerBlock"]

PER_LAYER = "per-layer inputs"
"""The name that they are lent by: [T, layers, P]."""


class PerLayerBlock(TwoProjections):
    """It keeps the gate [T, P] from :attr:`Keep.GATES` on."""

    def __init__(self, part: PerLayerGate, dtype: torch.dtype, device: torch.device, stream: int, scratch: Scratch):
        super().__init__(part.projections, dtype, device, stream, scratch)
        self.part = part
        self.gate, self.projection = self.sites

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        self.gate.fill_extra(n, on.seed, 0)
        gate = self.gate.forward(n)
        y = self.projection.forward(self._hidden(gate, on))
        return y, gate if keep is not None and keep >= Keep.GATES else None

    def _own(self, on: Pass) -> Tensor:
        """p [T, P], a view."""
        return on.lent[PER_LAYER].tensors[0][:, self.part.index]

    def _hidden(self, gate: Tensor, on: Pass) -> Tensor:
        """The projection's input buffer."""
        h = self.projection.input_buffer(gate.shape[0])
        mlp.gated_forward(gate, self._own(on), activation=self.part.activation, out=h[:, : self.projection.inputs])
        self.projection.fill_extra(h, on.seed, 0)
        return h

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`; p becomes its gradient."""
        if n is not None and fresh:
            self.gate.fill_extra(n, on.seed, 0)
        if kept is None:
            assert n is not None
            kept = self.gate.forward(n)
        h = self._hidden(kept, on) if self.projection.groups else None
        dh = self.projection.backward(dy, h, on.seed, sinks.get(self.projection))
        assert dh is not None
        mlp.gated_backward_(dh, kept, self._own(on), activation=self.part.activation)
        return self.gate.backward(kept, n, on.seed, sinks.get(self.gate), need_dx=need_dx)

    # -- sizes ----------------------------------------------------------------------------------------------------

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """See :meth:`Block.kept_bytes`."""
        columns = self.gate.outputs if keep >= Keep.GATES else 0
        return memory.tokens * columns * self.dtype.itemsize

    def working_bytes(self, memory: Memory) -> int:
        """See :meth:`Block.working_bytes`."""
        columns = 2 * self.columns + self.gate.outputs + 2 * (self.projection.inputs + self.projection.extra)
        return memory.tokens * columns * self.dtype.itemsize

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        return memory.tokens

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        return float(self.gate.inputs * self.gate.outputs) if keep < Keep.GATES else 0.0
