"""Self-attention: y = o(attention(q, k, v)), q, k, v = qkv(n), q and k normalised and rotated where the model does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.attention import Attention
from slimtune.engine.blocks.block import Block, Keep, Memory, Pass, Sinks
from slimtune.engine.kernels import norm, rope
from slimtune.engine.structure import Norm, SelfAttention
from slimtune.engine.weights import Scratch, Site

__all__ = ["AttentionBlock"]


@dataclass
class _Kept:
    qkv: Tensor
    """Rotated, unless there are norms: then as projected."""
    q: Tensor
    """As attention took it, [T, N, D]: a view of ``qkv`` without norms."""
    k: Tensor
    rstd: tuple[Tensor, ...]
    """Of the norms of q and k."""
    o: Tensor
    """o's input buffer."""
    attention: tuple[Any, ...]


class AttentionBlock(Block):
    """N heads and K kv heads of D, over any :class:`Pass`."""

    def __init__(self, part: SelfAttention, dtype: torch.dtype, device: torch.device, stream: int, scratch: Scratch):
        self.part, self.dtype = part, dtype
        self.qkv, self.o = (
            Site(projection, dtype, device, stream + number, scratch)
            for number, projection in enumerate(part.projections)
        )
        self.sites = (self.qkv, self.o)

    @property
    def columns(self) -> int:
        """qkv's."""
        return self.qkv.inputs + self.qkv.extra

    @property
    def reads_input(self) -> bool:
        """For the gradients of qkv's adapters."""
        return self.qkv.groups > 0

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        self.qkv.fill_extra(n, on.seed, 0)
        kept = self._attend(n, on)
        y = self.o.forward(kept.o)
        return y, kept if keep is not None and keep >= Keep.ATTENTION else None

    def _attend(self, n: Tensor, on: Pass) -> _Kept:
        qkv = self.qkv.forward(n)
        q, k, v = self._split(qkv)
        q, k, rstd = self._position(q, k, on)
        attended, saved = self._attention(on).forward(q, k, v)
        return _Kept(qkv, q, k, rstd, self.o.buffer_of(attended.flatten(1), on.seed), saved)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._by_heads(qkv)
        n, k = self.part.heads, self.part.kv_heads
        return heads[:, :n], heads[:, n : n + k], heads[:, n + k :]

    def _by_heads(self, x: Tensor) -> Tensor:
        """[T, heads x D] as [T, heads, D], the same memory."""
        return x.view(x.shape[0], -1, self.part.head_dim)

    def _position(self, q: Tensor, k: Tensor, on: Pass) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Normalise and rotate q and k: in place without norms."""
        part, turn = self.part, self._turn(on)
        if part.q_norm is None or part.k_norm is None:
            if turn:
                rope.rope_(q, k, *turn)
            return q, k, ()
        if turn and not part.norms_rows:
            q, k, rstd = rope.qk_norm_rope(q, k, part.q_norm.weight, part.k_norm.weight, part.q_norm.eps, *turn)
            return q, k, (rstd,)
        (q, q_rstd), (k, k_rstd) = self._normed(q, part.q_norm), self._normed(k, part.k_norm)
        if turn:
            rope.rope_(q, k, *turn)
        return q, k, (q_rstd, k_rstd)

    def _rows(self, x: Tensor) -> Tensor:
        """[T, heads, D] as the rows that a norm goes over: [T, heads x D], or [T x heads, D]."""
        return x.flatten(1) if self.part.norms_rows else x.reshape(-1, x.shape[2])

    def _normed(self, x: Tensor, over: Norm) -> tuple[Tensor, Tensor]:
        y, _, rstd = norm.norm_forward(self._rows(x), over.weight, over.eps, centred=over.centred)
        return y.view(x.shape), rstd

    def _turn(self, on: Pass) -> tuple[Any, ...]:
        """What rope's kernels take after q and k; nothing where positions don't enter."""
        if self.part.rotary is None:
            return ()
        table = on.tables[self.part.rotary]
        return table.cos, table.sin, on.position_ids, table.pairs

    def _attention(self, on: Pass) -> Attention:
        part = self.part
        return Attention(on.documents, on.ways[part.kind], part.scale, part.window, part.softcap)

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`."""
        if n is not None and fresh:
            self.qkv.fill_extra(n, on.seed, 0)
        if kept is None:
            assert n is not None
            kept = self._attend(n, on)
        do = self.o.backward(dy, kept.o, on.seed, sinks.get(self.o))
        assert do is not None
        dqkv = self._attention_backward(do, kept, on)
        return self.qkv.backward(dqkv, n, on.seed, sinks.get(self.qkv), need_dx=need_dx)

    def _attention_backward(self, do: Tensor, kept: _Kept, on: Pass) -> Tensor:
        """dqkv [T, (N + 2 K) D], of the projection's output."""
        part, turn = self.part, self._turn(on)
        q, k, v = self._split(kept.qkv)
        o, do = self._by_heads(kept.o[:, : self.o.inputs]), self._by_heads(do)
        dq, dk, dv = self._attention(on).backward(do, kept.q, kept.k, v, o, kept.attention)
        if part.q_norm is None or part.k_norm is None:
            merged = rope.merge_qkv_grad(dq, dk, dv, *turn) if turn else torch.cat((dq, dk, dv), dim=1)
            return merged.flatten(1)
        if turn and not part.norms_rows:
            merged = rope.qk_norm_rope_backward(
                dq, dk, dv, q, k, part.q_norm.weight, part.k_norm.weight, kept.rstd[0], *turn
            )
            return merged.flatten(1)
        if turn:
            rope.rope_(dq, dk, *turn, inverse=True)
        parts = zip((dq, dk), (q, k), (part.q_norm, part.k_norm), kept.rstd, strict=True)
        before = [self._norm_backward(d, x, over, rstd) for d, x, over, rstd in parts]
        return torch.cat((*before, dv), dim=1).flatten(1)

    def _norm_backward(self, d: Tensor, x: Tensor, over: Norm, rstd: Tensor) -> Tensor:
        rows = self._rows(d.contiguous()), self._rows(x)
        return norm.norm_backward(*rows, over.weight, rstd, centred=over.centred).view(x.shape)

    # -- sizes ----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> tuple[object, ...]:
        """See :attr:`Block.kind`."""
        return *super().kind, self.part.heads, self.part.kv_heads, self.part.head_dim

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """See :meth:`Block.kept_bytes`."""
        if keep < Keep.ATTENTION:
            return 0
        part, tokens = self.part, memory.tokens
        columns = self.qkv.outputs + self.o.inputs + self.o.extra
        # The memory-efficient kernel's logsumexp has as many for each document of a run as for the longest.
        efficient = memory.ways[part.kind] == "efficient"
        floats = part.heads * (max(4 * tokens, memory.padded_room) if efficient else tokens)
        if part.q_norm is not None:
            columns += (part.heads + part.kv_heads) * part.head_dim
            floats += (part.heads + part.kv_heads) * tokens
        if keep >= Keep.ALL and self.qkv.groups:
            columns += self.columns
        return tokens * columns * self.dtype.itemsize + 4 * floats

    def working_bytes(self, memory: Memory) -> int:
        """See :meth:`Block.working_bytes`."""
        part, tokens, size = self.part, memory.tokens, self.dtype.itemsize
        q, qkv, hidden = part.heads * part.head_dim, self.qkv.outputs, self.o.outputs
        # FlashAttention-2's backward sums dq in float32; cuDNN's likewise. dq, dk, dv lie beside the merged gradient.
        attention = tokens * (2 * qkv * size + 2 * q * size + 4 * q + 2 * hidden * size)
        if memory.ways[part.kind] == "efficient":
            # dq's sums for a run's documents, each as long as its longest; k, v, dk and dv with q's heads, and o.
            attention += 4 * q * (max(2 * tokens, memory.padded_room) - tokens) + tokens * 5 * q * size
        return attention

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        return memory.tokens

    @property
    def products(self) -> float:
        """See :attr:`Block.products`."""
        return float(sum(site.inputs * site.outputs for site in self.sites))

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        return self.products if keep < Keep.ATTENTION else 0.0
