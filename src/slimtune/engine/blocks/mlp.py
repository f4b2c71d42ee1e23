"""The gated MLP: y = down(act(gate) x up), gate, up = gate_up(n), in chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks.block import Keep, Memory, Pass, Sinks, TwoProjections
from slimtune.engine.fp8 import Rows
from slimtune.engine.kernels import mlp, mlp_fp8
from slimtune.engine.stored import dense
from slimtune.engine.structure import GatedMlp
from slimtune.engine.weights import Scratch

__all__ = ["MlpBlock"]


class MlpBlock(TwoProjections):
    """F gates and ups. It keeps gate and up [T, 2 F] from :attr:`Keep.GATES` on."""

    def __init__(self, part: GatedMlp, dtype: torch.dtype, device: torch.device, stream: int, scratch: Scratch):
        super().__init__(part.projections, dtype, device, stream, scratch)
        self.part = part
        self.gate_up, self.down = self.sites
        self._weigher = None if part.weigher is None else dense(part.weigher, dtype)

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        kept = None
        y = torch.empty(on.tokens, self.down.outputs, dtype=self.dtype, device=n.device)
        if keep is not None and keep >= Keep.GATES:
            kept = torch.empty(on.tokens, self.gate_up.outputs, dtype=self.dtype, device=n.device)
        for number, rows in enumerate(on.chunks):
            self.gate_up.fill_extra(n[rows], on.seed, number)
            gates = self.gate_up.forward(n[rows], out=None if kept is None else kept[rows])
            h, eighths = self._hidden(gates, on, number)
            self.down.forward(h, out=y[rows], eighths=eighths)
            weight = self._weight(n[rows])
            if weight is not None:
                y[rows] *= weight
            del gates, h, eighths  # not beside the next chunk's
        return y, kept

    def _hidden(self, gates: Tensor, on: Pass, number: int) -> tuple[Tensor | None, Rows | None]:
        """down's input buffer, and what it multiplies of that in FP8; one of them where down reads no more."""
        halves, activation, eight = gates.chunk(2, dim=1), self.part.activation, self.down.in_fp8
        if eight is not None and not self.down.extra:
            return None, mlp_fp8.gated_forward(*halves, activation=activation, again=eight.again)
        h, eighths = self.down.input_buffer(gates.shape[0]), None
        first = h[:, : self.down.inputs]
        if eight is None:
            mlp.gated_forward(*halves, activation=activation, out=first)
        else:
            eighths = mlp_fp8.gated_forward(*halves, activation=activation, out=first, again=eight.again)
        self.down.fill_extra(h, on.seed, number)
        return h, eighths

    def _weight(self, n: Tensor) -> Tensor | None:
        """What each token's result is multiplied with, [rows, 1]."""
        return None if self._weigher is None else torch.sigmoid(n[:, : self.gate_up.inputs] @ self._weigher.t())

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`."""
        chunks = on.chunks
        dn = torch.empty(dy.shape, dtype=self.dtype, device=dy.device) if need_dx and len(chunks) > 1 else None
        for number, rows in enumerate(chunks):
            part = None if n is None else n[rows]
            if part is not None and fresh:
                self.gate_up.fill_extra(part, on.seed, number)
            if kept is None:
                assert part is not None
                gates = self.gate_up.forward(part)
            else:
                gates = kept[rows]
            weight = None if part is None else self._weight(part)
            dlogit, eighths = self._gates_backward(dy[rows], gates, on, number, sinks, weight)
            out = None if dn is None else dn[rows]
            d = self.gate_up.backward(
                gates, part, on.seed, sinks.get(self.gate_up), chunk=number, need_dx=need_dx, out=out, eighths=eighths
            )
            if d is not None and dlogit is not None and self._weigher is not None:
                d = torch.addmm(d, dlogit, self._weigher)
            if out is None:
                dn = d
            elif d is not None and d.data_ptr() != out.data_ptr():
                out.copy_(d)
            del d, gates, eighths  # not beside the next chunk's
        return dn

    def _gates_backward(
        self, dy: Tensor, gates: Tensor, on: Pass, number: int, sinks: Sinks, weight: Tensor | None
    ) -> tuple[Tensor | None, Rows | None]:
        """Overwrite gates [rows, 2 F] with their gradient; that of the token's own weight before its sigmoid [rows, 1].

        In FP8 the gates' gradient is given too, and gates take it only where gate_up reads them.

        The weight's is dy · y for the result y without it. That is h · dh, as dh is dy by the transpose of what makes
        y of h: so y isn't needed again.
        """
        gate, up = gates.chunk(2, dim=1)
        h = None
        if self.down.groups or weight is not None:
            h = self.down.input_buffer(dy.shape[0])
            mlp.gated_forward(gate, up, activation=self.part.activation, out=h[:, : self.down.inputs])
            self.down.fill_extra(h, on.seed, number)
        weighed = dy if weight is None else dy * weight
        dh = self.down.backward(weighed, h, on.seed, sinks.get(self.down), chunk=number)
        assert dh is not None
        dlogit = None
        if weight is not None:
            assert h is not None
            wide = torch.promote_types(self.dtype, torch.float32)
            dot = torch.linalg.vecdot(dh.to(wide), h[:, : self.down.inputs].to(wide))[:, None]
            dlogit = (dot * (1 - weight.to(wide))).to(self.dtype)
        del h
        eight, activation = self.gate_up.in_fp8, self.part.activation
        if eight is None or eight.switch.counted is not None:
            mlp.gated_backward_(dh, gate, up, activation=activation)
            return dlogit, None
        in_place = self.gate_up.groups > 0
        return dlogit, mlp_fp8.gated_backward(dh, gate, up, eight.scales, activation=activation, in_place=in_place)

    @property
    def reads_input(self) -> bool:
        """For the gradients of the first projection's adapters, and for the token's own weight."""
        return super().reads_input or self._weigher is not None

    # -- sizes ----------------------------------------------------------------------------------------------------

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """See :meth:`Block.kept_bytes`."""
        columns = self.gate_up.outputs if keep >= Keep.GATES else 0
        return memory.tokens * columns * self.dtype.itemsize

    def working_bytes(self, memory: Memory) -> int:
        """See :meth:`Block.working_bytes`."""
        rows, hidden = self.rows(memory), self.down.inputs + self.down.extra
        # n, and where there are chunks dn; of a chunk gate and up, beside h and dh, or beside dx once they are gone;
        # and what of the products' gradients is in FP8.
        size, dy, dgates = self.dtype.itemsize, self.down.fp8_columns, self.gate_up.fp8_columns
        tokens = memory.tokens * (self.columns + (self.down.outputs if rows < memory.tokens else 0))
        chunk = rows * (self.gate_up.outputs * size + max(2 * hidden * size + dy, self.columns * size + dgates))
        working = tokens * size + chunk
        if self._weigher is None:
            return working
        # dy once more; h beside dh, both in float32 where they are multiplied.
        more = 2 * self.down.outputs * self.dtype.itemsize + 3 * self.down.inputs * max(4, self.dtype.itemsize)
        return working + self.rows(memory) * more

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        return min(memory.tokens, memory.mlp_tokens)

    def chunks(self, memory: Memory) -> int:
        """See :meth:`Block.chunks`."""
        return -(-memory.tokens // memory.mlp_tokens)

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        return float(self.gate_up.inputs * self.gate_up.outputs) if keep < Keep.GATES else 0.0
