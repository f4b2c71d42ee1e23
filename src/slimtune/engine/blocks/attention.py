"""Self-attention: y = o(attention(q, k, v)), where q, k, v are qkv(n) as :mod:`slimtune.engine.blocks.heads` has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.attention import Attention, heads_at_once
from slimtune.engine.blocks.block import Keep, Memory, Pass, Sinks, TwoProjections
from slimtune.engine.blocks.heads import Heads, by_heads
from slimtune.engine.kernels import mlp, rope
from slimtune.engine.structure import SelfAttention
from slimtune.engine.weights import Scratch

__all__ = ["AttentionBlock"]


@dataclass
class _Kept:
    qkv: Tensor
    """As projected; rotated in place where there are no norms."""
    q: Tensor
    """As attention took it, [T, N, D]: a view of ``qkv`` without norms."""
    k: Tensor
    v: Tensor
    rstd: tuple[Tensor, ...]
    """Of the heads' norms."""
    o: Tensor
    """o's input buffer."""
    attention: tuple[Any, ...]
    gate: Tensor | None = None
    """[T, N D], where what attention gave is multiplied with its sigmoid."""
    attended: Tensor | None = None
    """What attention gave then, [T, N D]; without a gate ``o`` begins with it."""


@dataclass
class _Attended:
    """What attention gave: the rest of :class:`_Kept` is had again without it."""

    result: Tensor
    """o's input buffer; with a gate what attention gave, [T, N D]."""
    attention: tuple[Any, ...]


class AttentionBlock(TwoProjections):
    """N heads and K kv heads of D, over any :class:`Pass`."""

    def __init__(self, part: SelfAttention, dtype: torch.dtype, device: torch.device, stream: int, scratch: Scratch):
        super().__init__(part.projections, dtype, device, stream, scratch)
        self.part, self.heads = part, Heads(part)
        self.qkv, self.o = self.sites

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        self.qkv.fill_extra(n, on.seed, 0)
        kept = self._attend(n, on)
        y = self.o.forward(kept.o)
        if keep is None or keep < Keep.ATTENDED:
            return y, None
        if keep == Keep.ATTENDED:
            return y, _Attended(kept.o if kept.attended is None else kept.attended, kept.attention)
        return y, kept

    def again(self, n: Tensor, on: Pass, keep: Keep, made: Any) -> tuple[Tensor, Any]:
        """See :meth:`Block.again`."""
        self.qkv.fill_extra(n, on.seed, 0)
        kept = self._attend(n, on, made)
        return self.o.forward(kept.o), kept

    def _attend(self, n: Tensor, on: Pass, made: _Attended | None = None) -> _Kept:
        qkv, part, turn = self.qkv.forward(n), self.part, self._turn(on)
        qkv, gate = self._without_gate(qkv)
        if part.borrows is None:
            q, k, v, rstd = self.heads.forward(qkv, turn)
        else:
            (q, rstd), (k, v) = self.heads.query(qkv, turn), on.lent[part.borrows].tensors
        if part.lends is not None:
            on.lend(part.lends, k, v)
        self._grow_(q, on)
        if made is None:
            attended, saved = self._attention(on).forward(q, k, v)
            result = attended.flatten(1)
        else:
            result, saved = made.result, made.attention
        if gate is None:
            o = self.o.buffer_of(result, on.seed) if made is None else result
            return _Kept(qkv, q, k, v, rstd, o, saved)
        o = self.o.input_buffer(len(result))
        mlp.gated_forward(gate, result, activation="sigmoid", out=o[:, : self.o.inputs])
        self.o.fill_extra(o, on.seed, 0)
        return _Kept(qkv, q, k, v, rstd, o, saved, gate, result)

    def _without_gate(self, product: Tensor) -> tuple[Tensor, Tensor | None]:
        """q, k, v one after the other, and the gates [T, N D] if there are any."""
        if not self.part.gated:
            return product, None
        both, rest = product.tensor_split([2 * self.o.inputs], dim=1)
        q, gate = both.view(len(both), self.part.heads, 2, -1).unbind(2)
        return torch.cat((q.flatten(1), rest), dim=1), gate.flatten(1)

    def _with_gate(self, dqkv: Tensor, dgate: Tensor) -> Tensor:
        """The way back: the product's gradient from those of q, k, v and of the gates."""
        dq, rest = dqkv.tensor_split([self.o.inputs], dim=1)
        both = torch.stack([by_heads(x.contiguous(), self.part.head_dim) for x in (dq, dgate)], dim=2)
        return torch.cat((both.flatten(1), rest), dim=1)

    def _grow_(self, q: Tensor, on: Pass) -> None:
        """Multiply rotated queries, or their gradient, with what their positions ask for: its own transpose."""
        growth = None if self.part.rotary is None else on.tables[self.part.rotary].growth
        if growth is not None:
            q.mul_(growth[on.position_ids].to(q.dtype)[:, None, None])

    def _turn(self, on: Pass) -> tuple[Any, ...]:
        """What rope's kernels take after q and k; nothing where positions don't enter."""
        if self.part.rotary is None:
            return ()
        table = on.tables[self.part.rotary]
        return table.cos, table.sin, on.position_ids, table.pairs

    def _attention(self, on: Pass) -> Attention:
        part = self.part
        sinks = None if part.sinks is None else part.sinks.detach()
        return Attention(on.documents, on.ways[part.kind], part.scale, part.window, part.softcap, sinks)

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`."""
        if n is not None and fresh:
            self.qkv.fill_extra(n, on.seed, 0)
        if not isinstance(kept, _Kept):
            assert n is not None
            kept = self._attend(n, on, kept)
        dqkv = self._attention_backward(self.o.backward(dy, kept.o, on.seed, sinks.get(self.o)), kept, on)
        return self.qkv.backward(dqkv, n, on.seed, sinks.get(self.qkv), need_dx=need_dx)

    def _attention_backward(self, do: Tensor | None, kept: _Kept, on: Pass) -> Tensor:
        """The gradient of qkv's product, [T, its columns]."""
        assert do is not None
        result = kept.o[:, : self.o.inputs]
        if kept.gate is not None:
            assert kept.attended is not None
            through, result = do, kept.attended
            do = result.clone()
            mlp.gated_backward_(through, kept.gate, do, activation="sigmoid")
        o, do = (by_heads(x, self.part.head_dim) for x in (result, do))
        if on.sparing and self._alone:
            return self._backward_in_place(do, o, kept, on)
        dq, dk, dv = self._attention(on).backward(do, kept.q, kept.k, kept.v, o, kept.attention)
        self._grow_(dq, on)
        if self.part.borrows is not None:
            on.lent[self.part.borrows].collect(dk, dv)
            return self.heads.query_backward(dq, kept.qkv, kept.rstd, self._turn(on))
        if self.part.lends is not None:
            dk, dv = on.lent[self.part.lends].with_own(dk, dv)
        dqkv = self.heads.backward(dq, dk, dv, kept.qkv, kept.rstd, self._turn(on))
        return dqkv if kept.gate is None else self._with_gate(dqkv, kept.gate)

    @property
    def _alone(self) -> bool:
        """Whether q, k and v are nobody else's, so that their gradients may take their places."""
        return self.part.lends is None and self.part.borrows is None and not self.part.keys_are_values

    @property
    def _normed(self) -> bool:
        return any(over is not None for over in (self.part.q_norm, self.part.k_norm, self.part.v_norm))

    def _backward_in_place(self, do: Tensor, o: Tensor, kept: _Kept, on: Pass) -> Tensor:
        """As :meth:`_attention_backward`, with q, k and v becoming their gradients."""
        self._attention(on).backward_in_place(do, kept.q, kept.k, kept.v, o, kept.attention)
        self._grow_(kept.q, on)
        turn, dqkv = self._turn(on), kept.qkv
        if self._normed:
            dqkv = self.heads.backward(kept.q, kept.k, kept.v, kept.qkv, kept.rstd, turn)
        elif turn:
            rope.rope_(kept.q, kept.k, *turn, inverse=True)
        return dqkv if kept.gate is None else self._with_gate(dqkv, kept.gate)

    # -- sizes ----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> tuple[object, ...]:
        """See :attr:`Block.kind`."""
        part = self.part
        return *super().kind, part.heads, part.kv_heads, part.head_dim, part.lends is None, part.borrows is None

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """See :meth:`Block.kept_bytes`."""
        part, tokens, size = self.part, memory.tokens, self.dtype.itemsize
        # What is lent is there from the forward of its layer to its backward, and its collected gradients with it.
        lent = tokens * 2 * part.kv_heads * part.head_dim if part.lends is not None else 0
        if keep < Keep.ATTENDED:
            return lent * (size + max(4, size))
        # The memory-efficient kernel's logsumexp has as many for each document of a run as for the longest.
        efficient = memory.ways[part.kind] == "efficient"
        floats = part.heads * (max(4 * tokens, memory.padded_room) if efficient else tokens)
        if keep < Keep.ATTENTION:
            columns = self.o.inputs + (0 if part.gated else self.o.extra)
            return tokens * columns * size + 4 * floats + lent * (size + max(4, size))
        columns = self.qkv.outputs + self.o.inputs * (1 + part.gated) + self.o.extra
        normed = part.heads * (part.q_norm is not None)
        if part.borrows is None:
            normed += part.kv_heads * ((part.k_norm is not None) + (part.v_norm is not None))
        columns += normed * part.head_dim
        floats += normed * tokens
        return tokens * columns * size + 4 * floats + lent * max(4, size)

    def working_bytes(self, memory: Memory) -> int:
        """See :meth:`Block.working_bytes`."""
        part, tokens, size = self.part, memory.tokens, self.dtype.itemsize
        q, qkv, hidden = part.heads * part.head_dim, (part.heads + 2 * part.kv_heads) * part.head_dim, self.o.outputs
        if memory.sparing and self._alone:
            return self._sparing_bytes(memory, q, qkv)
        # FlashAttention-2's backward sums dq in float32; cuDNN's likewise. dq, dk, dv lie beside the merged gradient.
        attention = tokens * (2 * qkv * size + 2 * q * size + 4 * q + 2 * hidden * size)
        # The product beside what it is split into, or its gradient beside theirs; what attention gave once more.
        attention += tokens * (self.qkv.outputs + 2 * q) * size * part.gated
        if memory.ways[part.kind] == "efficient":
            # dq's sums for a run's documents, each as long as its longest; k, v, dk and dv with q's heads, and o.
            attention += 4 * q * (max(2 * tokens, memory.padded_room) - tokens) + tokens * 5 * q * size
        return attention

    def _sparing_bytes(self, memory: Memory, q: int, qkv: int) -> int:
        part, tokens, size = self.part, memory.tokens, self.dtype.itemsize
        # Of a group: dq, dk, dv, dq's sums in float32, dk and dv of each query head, and copies of o and do.
        group = tokens * (qkv * size + 4 * q + 4 * q * size)
        if memory.ways[part.kind] == "efficient":
            group += 4 * q * (max(2 * tokens, memory.padded_room) - tokens) + tokens * 5 * q * size
        group = group * heads_at_once(tokens, part.heads, part.kv_heads) // part.kv_heads
        # do for all heads beside it, or dx once they are gone; the gradient's way back through norms isn't in place.
        columns = max(q + self.o.extra, self.columns) + qkv * self._normed
        columns += (self.qkv.outputs + 2 * q) * part.gated
        # The product's gradient in FP8 comes after the group.
        return max(group, tokens * self.qkv.fp8_columns) + tokens * columns * size

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        return memory.tokens

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        return self.products if keep < Keep.ATTENTION else 0.0
