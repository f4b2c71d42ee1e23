"""From qkv's product to the q, k and v that attention takes, and their gradients' way back.

q and k are normalised and rotated, and v is normalised, where the model does. Keys may be the values too, each
normalised in its own way. Shapes: T tokens, N heads, K kv heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.engine.kernels import norm, rope
from slimtune.engine.structure import Norm, SelfAttention

__all__ = ["Heads", "by_heads"]


def by_heads(x: Tensor, head_dim: int) -> Tensor:
    """[T, heads x D] as [T, heads, D], the same memory."""
    return x.view(x.shape[0], -1, head_dim)


class Heads:
    """One attention's heads; ``turn`` is what rope's kernels take after q and k, empty where positions don't enter."""

    def __init__(self, part: SelfAttention) -> None:
        self.part = part

    def forward(self, qkv: Tensor, turn: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """q [T, N, D], k and v [T, K, D], and the norms' rstd; in place without norms."""
        q, k, v = self._split(qkv)
        if self.part.v_norm is None:
            q, k, rstd = self._positioned(q, k, turn)
            return q, k, v, rstd
        v, v_rstd = self._normed(v, self.part.v_norm)
        q, k, rstd = self._positioned(q, k, turn)
        return q, k, v, (*rstd, v_rstd)

    def query(self, qkv: Tensor, turn: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`forward` where keys and values are borrowed: q alone."""
        q = by_heads(qkv, self.part.head_dim)
        if self.part.q_norm is None:
            return self._turned(q, turn), ()
        q, rstd = self._normed(q, self.part.q_norm)
        return self._turned(q, turn), (rstd,)

    def query_backward(self, dq: Tensor, qkv: Tensor, rstd: tuple[Tensor, ...], turn: tuple[Any, ...]) -> Tensor:
        """As :meth:`backward`, of :meth:`query`."""
        dq = self._turned(dq.contiguous(), turn, inverse=True)
        if self.part.q_norm is not None:
            dq = self._norm_backward(dq, by_heads(qkv, self.part.head_dim), self.part.q_norm, rstd[0])
        return dq.flatten(1)

    @staticmethod
    def _turned(q: Tensor, turn: tuple[Any, ...], *, inverse: bool = False) -> Tensor:
        """q, rotated in place; the kernel takes two sets of heads."""
        if turn:
            rope.rope_(q[:, : q.shape[1] // 2], q[:, q.shape[1] // 2 :], *turn, inverse=inverse)
        return q

    def backward(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        qkv: Tensor,
        rstd: tuple[Tensor, ...],
        turn: tuple[Any, ...],
    ) -> Tensor:
        """The gradient of qkv, [T, its columns] with any row stride; dq and dk may be overwritten.

        Args:
            dq: [T, N, D].
            dk: [T, K, D].
            dv: [T, K, D].
            qkv: As the forward left it.
            rstd: The forward's.
            turn: The forward's.
        """
        part, (q, k, v) = self.part, self._split(qkv)
        if part.v_norm is not None:
            dv = self._norm_backward(dv, v, part.v_norm, rstd[-1])
        merged = self._merged(dq, dk, dv, q, k, rstd, turn)
        if part.keys_are_values:
            end = part.heads + part.kv_heads
            merged[:, part.heads : end] += merged[:, end:]
            merged = merged[:, :end]
        return merged.flatten(1)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of qkv's product, as :meth:`forward` gives them."""
        heads, n = by_heads(qkv, self.part.head_dim), self.part.heads
        k, v = heads[:, n : n + self.part.kv_heads], heads[:, n + self.part.kv_heads :]
        return heads[:, :n], k, k if self.part.keys_are_values else v

    def _positioned(self, q: Tensor, k: Tensor, turn: tuple[Any, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Normalise and rotate q and k."""
        part = self.part
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

    def _merged(
        self, dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, rstd: tuple[Tensor, ...], turn: tuple[Any, ...]
    ) -> Tensor:
        """[T, N + 2 K, D]: the gradients of q and k as they were, and dv."""
        part = self.part
        if part.q_norm is None or part.k_norm is None:
            return rope.merge_qkv_grad(dq, dk, dv, *turn) if turn else torch.cat((dq, dk, dv), dim=1)
        if turn and not part.norms_rows:
            weights = part.q_norm.weight, part.k_norm.weight
            return rope.qk_norm_rope_backward(dq, dk, dv, q, k, *weights, rstd[0], *turn)
        if turn:
            rope.rope_(dq, dk, *turn, inverse=True)
        parts = zip((dq, dk), (q, k), (part.q_norm, part.k_norm), rstd[:2], strict=True)
        return torch.cat((*(self._norm_backward(d, x, over, r) for d, x, over, r in parts), dv), dim=1)

    def _rows(self, x: Tensor) -> Tensor:
        """[T, heads, D] as the rows that a norm goes over: [T, heads x D], or [T x heads, D]."""
        return x.flatten(1) if self.part.norms_rows else x.reshape(-1, x.shape[2])

    def _normed(self, x: Tensor, over: Norm) -> tuple[Tensor, Tensor]:
        y, _, rstd = norm.norm_forward(self._rows(x), over.weight, over.eps, centred=over.centred)
        return y.view(x.shape), rstd

    def _norm_backward(self, d: Tensor, x: Tensor, over: Norm, rstd: Tensor) -> Tensor:
        rows = self._rows(d.contiguous()), self._rows(x)
        return norm.norm_backward(*rows, over.weight, rstd, centred=over.centred).view(x.shape)
