"""The gated delta rule: y = out(norm(rule(silu(conv(mixed)), g, beta)) x silu(z)), mixed, z, b, a = inputs(n).

beta = sigmoid(b) and g = -exp(a_log) softplus(a + dt_bias), in float32 (Transformers' ``Qwen3NextGatedDeltaNet``). What
the rule is: :mod:`slimtune.engine.kernels.reference_delta`. Everything behind the first product costs little to compute
again, and its states are as large as a few products: they are kept at :attr:`Keep.ALL` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimtune.engine.blocks.block import Keep, Memory, Pass, Sinks, TwoProjections
from slimtune.engine.kernels import delta, mlp, norm, short_conv
from slimtune.engine.kernels.reference_delta import CHUNK
from slimtune.engine.structure import GatedDelta
from slimtune.engine.weights import Scratch

__all__ = ["DeltaBlock"]


class _Inputs(NamedTuple):
    """Parts of the first product, or their gradients."""

    mixed: Tensor
    """[T, columns of q, k and v]."""
    z: Tensor
    """[T, V Dv]."""
    b: Tensor
    """[T, V]."""
    a: Tensor
    """[T, V]."""


class _Rule(NamedTuple):
    """What the rule's backward needs."""

    o: Tensor
    """[T, V Dv], before the norm."""
    saved: delta.DeltaSaved


@dataclass
class _Kept:
    product: Tensor
    """Of the inputs."""
    rule: _Rule | None


class DeltaBlock(TwoProjections):
    """V value heads and K key heads, over any :class:`Pass`."""

    def __init__(self, part: GatedDelta, dtype: torch.dtype, device: torch.device, stream: int, scratch: Scratch):
        super().__init__(part.projections, dtype, device, stream, scratch)
        self.part, self.heads = part, part.heads
        self.inputs, self.out = self.sites
        self._wide = torch.promote_types(dtype, torch.float32)
        self._rate = -part.a_log.to(self._wide).exp()

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        self.inputs.fill_extra(n, on.seed, 0)
        product = self.inputs.forward(n)
        parts = self._split(product)
        rule = self._ruled(self._convolved(parts, on), parts, on)
        y = self.out.forward(self._hidden(parts.z, self._normed(rule.o)[0], on))
        if keep is None or keep < Keep.ATTENTION:
            return y, None
        return y, _Kept(product, rule if keep >= Keep.ALL else None)

    def _convolved(self, parts: _Inputs, on: Pass) -> Tensor:
        """All q, k and v [T, columns]."""
        return short_conv.conv_silu_forward(parts.mixed, self.part.conv, self.part.conv_bias, on.documents.starts)

    def _gates(self, parts: _Inputs) -> tuple[Tensor, Tensor]:
        """g and beta [T, V]."""
        raised = parts.a.to(self._wide) + self.part.dt_bias.to(self._wide)
        return self._rate * torch.nn.functional.softplus(raised), parts.b.to(self._wide).sigmoid()

    def _ruled(self, mixed: Tensor, parts: _Inputs, on: Pass) -> _Rule:
        documents = on.documents
        return _Rule(
            *delta.delta_forward(mixed, *self._gates(parts), documents.starts, documents.boundaries, self.heads)
        )

    def _normed(self, o: Tensor) -> tuple[Tensor, Tensor]:
        """o [T, V Dv] with every head normalised, and the norm's rstd."""
        over = self.part.norm
        y, _, rstd = norm.norm_forward(self._rows(o), over.weight, over.eps)
        return y.view(o.shape), rstd

    def _rows(self, x: Tensor) -> Tensor:
        """[T, V Dv] as [T V, Dv]."""
        return x.view(-1, self.heads.value_dim)

    def _hidden(self, z: Tensor, normed: Tensor, on: Pass) -> Tensor:
        """out's input buffer."""
        h = self.out.input_buffer(len(z))
        mlp.gated_forward(z, normed, out=h[:, : self.out.inputs])
        self.out.fill_extra(h, on.seed, 0)
        return h

    # -- the product's columns ------------------------------------------------------------------------------------

    def _widths(self) -> list[int]:
        """Of mixed, z, b and a."""
        columns = self.heads.columns
        return [sum(columns), columns[2], self.heads.values, self.heads.values]

    def _split(self, product: Tensor) -> _Inputs:
        if not self.part.by_key_head:
            return _Inputs(*torch.split(product, self._widths(), dim=1))
        heads, (keys, _, values) = self.heads, self.heads.columns
        first, second = torch.split(product, [2 * (keys + values), 2 * heads.values], dim=1)
        each = [x // heads.keys for x in (keys, keys, values, values)]
        q, k, v, z = (x.flatten(1) for x in torch.split(self._by_key_head(first), each, dim=2))
        b, a = (x.flatten(1) for x in self._by_key_head(second).chunk(2, dim=2))
        return _Inputs(torch.cat((q, k, v), dim=1), z, b, a)

    def _merged(self, parts: _Inputs) -> Tensor:
        """The way back."""
        if not self.part.by_key_head:
            return torch.cat(parts, dim=1)
        first = (*torch.split(parts.mixed, self.heads.columns, dim=1), parts.z)
        grouped = [
            torch.cat([self._by_key_head(x) for x in each], dim=2).flatten(1) for each in (first, (parts.b, parts.a))
        ]
        return torch.cat(grouped, dim=1)

    def _by_key_head(self, x: Tensor) -> Tensor:
        """[T, columns] as [T, K, columns / K]."""
        return x.view(len(x), self.heads.keys, -1)

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`."""
        if n is not None and fresh:
            self.inputs.fill_extra(n, on.seed, 0)
        if kept is None:
            assert n is not None
            kept = _Kept(self.inputs.forward(n), None)
        parts, part, documents = self._split(kept.product), self.part, on.documents
        mixed, (g, beta) = self._convolved(parts, on), self._gates(parts)
        rule: _Rule = kept.rule or self._ruled(mixed, parts, on)
        do = self._hidden_backward(dy, parts.z, rule.o, on, sinks)
        dmixed, dg, dbeta = delta.delta_backward(
            do, mixed, g, beta, documents.starts, documents.boundaries, self.heads, rule.saved
        )
        kept.rule = None
        del rule, do, mixed
        dmixed = short_conv.conv_silu_backward(dmixed, parts.mixed, part.conv, part.conv_bias, documents.starts)
        raised = parts.a.to(self._wide) + part.dt_bias.to(self._wide)
        da, db = dg * self._rate * raised.sigmoid(), dbeta * beta * (1 - beta)
        dproduct = self._merged(_Inputs(dmixed, parts.z, db.to(self.dtype), da.to(self.dtype)))
        return self.inputs.backward(dproduct, n, on.seed, sinks.get(self.inputs), need_dx=need_dx)

    def _hidden_backward(self, dy: Tensor, z: Tensor, o: Tensor, on: Pass, sinks: Sinks) -> Tensor:
        """do [T, V Dv]; z becomes its gradient."""
        normed, rstd = self._normed(o)
        h = self._hidden(z, normed, on) if self.out.groups else None
        dh = self.out.backward(dy, h, on.seed, sinks.get(self.out))
        assert dh is not None
        mlp.gated_backward_(dh, z, normed)
        return norm.norm_backward(self._rows(normed), self._rows(o), self.part.norm.weight, rstd).view(o.shape)

    # -- sizes ----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> tuple[object, ...]:
        """See :attr:`Block.kind`."""
        return *super().kind, self.heads

    def _rule_bytes(self, memory: Memory) -> int:
        return delta.DeltaSaved.nbytes(memory.tokens, self.heads, self._wide.itemsize)

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """See :meth:`Block.kept_bytes`."""
        if keep < Keep.ATTENTION:
            return 0
        product = memory.tokens * self.inputs.outputs * self.dtype.itemsize
        if keep < Keep.ALL:
            return product
        return product + memory.tokens * self.out.inputs * self.dtype.itemsize + self._rule_bytes(memory)

    def working_bytes(self, memory: Memory) -> int:
        """See :meth:`Block.working_bytes`."""
        # The rule's own, and the gradients of its states and values; mixed, its gradients before and behind the
        # convolution, the product's beside them; o, what is normed, h and their gradients; g, beta and theirs; and of
        # each value head the gradients of q and k.
        columns = 3 * sum(self.heads.columns) + 2 * self.inputs.outputs + 4 * self.out.inputs + self.out.extra
        wide = (8 + 2 * self.heads.key_dim) * self.heads.values * self._wide.itemsize
        streams = 2 * self.out.outputs
        return 2 * self._rule_bytes(memory) + memory.tokens * ((columns + streams) * self.dtype.itemsize + wide)

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        return memory.tokens

    @property
    def _rule_products(self) -> float:
        """Multiply-adds of the rule for one token."""
        keys, values = self.heads.key_dim, self.heads.value_dim
        return float(self.heads.values * (3 * keys * values + 2 * CHUNK * (keys + values)))

    @property
    def products(self) -> float:
        """See :attr:`Block.products`."""
        return super().products + self._rule_products

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        if keep >= Keep.ALL:
            return 0.0
        return self._rule_products + (
            0.0 if keep >= Keep.ATTENTION else float(self.inputs.inputs * self.inputs.outputs)
        )
