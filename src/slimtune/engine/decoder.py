"""The decoder's layers, forward and backward, written out by hand over flattened tokens.

One layer computes, for x [T, H] (T tokens, H hidden, F intermediate, N heads, K kv heads of D):

    n1 = norm(x)           q, k, v = qkv(n1), rotated      o = attention(q, k, v)
    m  = x + o_proj(o)     gate, up = gate_up(norm(m))     x' = m + down(silu(gate) x up)

The base is frozen, so only adapters have weight gradients, and most intermediates are needed for nothing but dx. What a
layer keeps from its forward is its :class:`Keep` level; the rest is computed again in its backward. The residual sum
x' is left as the pair (down's output, m): the next norm adds it on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.attention import Attention, Documents, Way
from slimtune.engine.kernels import mlp, norm, rope
from slimtune.engine.structure import Decoder, Layer
from slimtune.engine.weights import Gradients, Scratch, Site

__all__ = ["Keep", "LayerComputation", "LayerGradients", "Pass", "RotaryTable", "Saved", "computations"]


class Keep(IntEnum):
    """What a layer keeps for its backward; each level adds to the one before."""

    INPUT = 0
    """x alone; the whole layer but its last product is computed again."""
    ATTENTION = 1
    """q, k, v, o and m: the MLP's first product and the norms are computed again."""
    GATES = 2
    """gate and up: only norms are computed again."""
    ALL = 3
    """The adapters' inputs too: nothing is computed again but silu(gate) x up."""


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of every position: float32 [positions, D / 2]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, decoder: Decoder, positions: int, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        """Made by the model's own rotary module, so that each of its scalings is right."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        like = torch.empty(0, dtype=wide, device=device)
        cos, sin = decoder.backbone.rotary_emb(like, torch.arange(positions, device=device)[None])
        half = decoder.head_dim // 2
        return cls(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward and backward pass share."""

    documents: Documents
    way: Way
    position_ids: Tensor
    """int64 or int32 [T]."""
    rotary: RotaryTable
    seed: Tensor | None
    """int64 scalar of this micro-batch's dropout; None: no dropout (evaluation)."""
    mlp_tokens: int
    """Tokens that the MLP takes at once; fewer need less memory."""


@dataclass
class Saved:
    """What a layer kept. Its ``x`` is always there."""

    x: Tensor
    keep: Keep
    rstd: Tensor | None = None
    n1: Tensor | None = None
    qkv: Tensor | None = None
    """Rotated (unless there are q/k norms: then as projected)."""
    rotated: tuple[Tensor, Tensor, Tensor] | None = None
    """With q/k norms: q and k normalised and rotated, and their rstd."""
    o: Tensor | None = None
    """o_proj's input buffer."""
    attention: tuple[Any, ...] = ()
    m: Tensor | None = None
    m_rstd: Tensor | None = None
    n2: Tensor | None = None
    gates: Tensor | None = None


@dataclass(frozen=True)
class LayerGradients:
    """Where a layer's adapter gradients are added, in the order of :attr:`Layer.projections`."""

    qkv: Gradients | None
    o: Gradients | None
    gate_up: Gradients | None
    down: Gradients | None


class LayerComputation:
    """One decoder layer, computed for any :class:`Pass`."""

    def __init__(self, decoder: Decoder, layer: Layer, dtype: torch.dtype, device: torch.device, scratch: Scratch):
        self.layer, self.dtype = layer, dtype
        self.heads, self.kv_heads, self.head_dim = decoder.heads, decoder.kv_heads, decoder.head_dim
        self.qkv, self.o, self.gate_up, self.down = (
            Site(projection, dtype, device, 4 * layer.index + number, scratch)
            for number, projection in enumerate(layer.projections)
        )
        self.sites = (self.qkv, self.o, self.gate_up, self.down)
        self.adapted = any(site.groups for site in self.sites)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, residual: Tensor | None, on: Pass, keep: Keep | None) -> tuple[Tensor, Tensor, Saved]:
        """The layer's result as a pair to be added, both [T, H], and what it kept.

        Args:
            x: [T, H].
            residual: [T, H] that is to be added to x first.
            on: The pass.
            keep: What to keep; None keeps nothing (evaluation).
        """
        saved = self._attention_half(x, residual, on)
        if saved.o is None:
            raise RuntimeError("attention was not computed")
        saved = self._middle(saved, self.o.forward(saved.o), on)
        d = self._mlp(saved, on, keep)
        m = saved.m
        assert m is not None
        return d, m, self._only(saved, keep)

    def _attention_half(self, x: Tensor, residual: Tensor | None, on: Pass) -> Saved:
        n1 = self.qkv.input_buffer(x.shape[0])
        _, total, rstd = self._norm(self.layer.attention_norm, x, residual, n1[:, : self.qkv.inputs])
        self.qkv.fill_extra(n1, on.seed, 0)
        saved = Saved(total, Keep.ALL, rstd=rstd, n1=n1, qkv=self.qkv.forward(n1))
        self._attend(saved, on)
        return saved

    def _norm(self, module: Any, x: Tensor, residual: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return norm.rms_norm_forward(x, module.weight.detach(), module.variance_epsilon, residual=residual, out=out)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._by_heads(qkv)
        n, k = self.heads, self.kv_heads
        return heads[:, :n], heads[:, n : n + k], heads[:, n + k :]

    def _by_heads(self, x: Tensor) -> Tensor:
        """[T, heads x D] as [T, heads, D], the same memory."""
        return x.view(x.shape[0], -1, self.head_dim)

    def _attend(self, saved: Saved, on: Pass) -> None:
        """Rotate q and k, attend, and fill o_proj's input buffer."""
        assert saved.qkv is not None
        q, k, v = self._split(saved.qkv)
        q_norm, k_norm = self.layer.q_norm, self.layer.k_norm
        if q_norm is not None and k_norm is not None:
            q, k, rstd = rope.qk_norm_rope(
                q, k, q_norm.weight.detach(), k_norm.weight.detach(), q_norm.variance_epsilon,
                on.rotary.cos, on.rotary.sin, on.position_ids,
            )  # fmt: skip
            saved.rotated = (q, k, rstd)
        else:
            rope.rope_(q, k, on.rotary.cos, on.rotary.sin, on.position_ids)
        attended, saved.attention = self._attention(on).forward(q, k, v)
        saved.o = self.o.buffer_of(attended.flatten(1), on.seed)

    def _attention(self, on: Pass) -> Attention:
        return Attention(on.documents, on.way, self.head_dim**-0.5, self.layer.window)

    def _middle(self, saved: Saved, attended: Tensor, on: Pass) -> Saved:
        """m = x + o_proj's output, and its norm in gate_up's input buffer."""
        n2 = self.gate_up.input_buffer(attended.shape[0])
        _, m, m_rstd = self._norm(self.layer.mlp_norm, attended, saved.x, n2[:, : self.gate_up.inputs])
        return replace(saved, m=m, m_rstd=m_rstd, n2=n2)

    def _chunks(self, on: Pass) -> Sequence[slice]:
        tokens = on.position_ids.shape[0]
        return [slice(i, min(i + on.mlp_tokens, tokens)) for i in range(0, tokens, on.mlp_tokens)]

    def _mlp(self, saved: Saved, on: Pass, keep: Keep | None) -> Tensor:
        """down's output [T, H]; the MLP is computed in chunks of tokens."""
        assert saved.n2 is not None
        n2, chunks = saved.n2, self._chunks(on)
        tokens = n2.shape[0]
        d = torch.empty(tokens, self.down.outputs, dtype=self.dtype, device=n2.device)
        if keep is not None and keep >= Keep.GATES:
            saved.gates = torch.empty(tokens, self.gate_up.outputs, dtype=self.dtype, device=n2.device)
        for number, rows in enumerate(chunks):
            self.gate_up.fill_extra(n2[rows], on.seed, number)
            gates = self.gate_up.forward(n2[rows], out=None if saved.gates is None else saved.gates[rows])
            h = self.down.input_buffer(gates.shape[0])
            mlp.swiglu_forward(*gates.chunk(2, dim=1), out=h[:, : self.down.inputs])
            self.down.fill_extra(h, on.seed, number)
            self.down.forward(h, out=d[rows])
        return d

    def _only(self, saved: Saved, keep: Keep | None) -> Saved:
        """Without what ``keep`` doesn't keep."""
        if keep is None or keep == Keep.INPUT:
            return Saved(saved.x, Keep.INPUT)
        kept = replace(saved, keep=keep)
        if keep < Keep.ALL or not self.qkv.groups:
            kept.n1 = None
        if keep < Keep.ALL or not self.gate_up.groups:
            kept.n2 = None
        return kept

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward(
        self, g: Tensor, saved: Saved, on: Pass, gradients: LayerGradients, *, need_dx: bool = True
    ) -> Tensor | None:
        """dx [T, H] from g [T, H], the gradient of the layer's result; the adapters' gradients are added.

        Consumes ``saved``: some of its buffers are overwritten.
        """
        saved = self._recompute(saved, on)
        dm = self._mlp_backward(g, saved, on, gradients)
        assert saved.o is not None
        assert saved.rstd is not None
        do = self.o.backward(dm, saved.o, on.seed, gradients.o)
        assert do is not None
        dqkv = self._attention_backward(do, saved, on)
        dn1 = self.qkv.backward(dqkv, saved.n1, on.seed, gradients.qkv, need_dx=need_dx)
        if dn1 is None:
            return None
        weight = self.layer.attention_norm.weight
        return norm.rms_norm_backward(dn1, saved.x, weight.detach(), saved.rstd, dresidual=dm, out=dm)

    def _recompute(self, saved: Saved, on: Pass) -> Saved:
        """Compute again what the attention half needs and wasn't kept; the MLP's part follows chunk by chunk."""
        if saved.keep == Keep.INPUT:
            fresh = self._attention_half(saved.x, None, on)
            assert fresh.o is not None
            return self._middle(fresh, self.o.forward(fresh.o), on)
        if self.qkv.groups and saved.n1 is None:
            n1 = self.qkv.input_buffer(saved.x.shape[0])
            self._norm(self.layer.attention_norm, saved.x, None, n1[:, : self.qkv.inputs])
            self.qkv.fill_extra(n1, on.seed, 0)
            saved = replace(saved, n1=n1)
        if saved.n2 is None and (saved.gates is None or self.gate_up.groups):
            assert saved.m is not None
            n2 = self.gate_up.input_buffer(saved.x.shape[0])
            self._norm(self.layer.mlp_norm, saved.m, None, n2[:, : self.gate_up.inputs])
            saved = replace(saved, n2=n2)
        return saved

    def _mlp_backward(self, g: Tensor, saved: Saved, on: Pass, gradients: LayerGradients) -> Tensor:
        """dm [T, H]."""
        assert saved.m is not None
        assert saved.m_rstd is not None
        chunks = self._chunks(on)
        dn2 = torch.empty(g.shape, dtype=self.dtype, device=g.device) if len(chunks) > 1 else None
        for number, rows in enumerate(chunks):
            n2 = None if saved.n2 is None else saved.n2[rows]
            if n2 is not None and (saved.gates is None or (self.gate_up.groups and saved.keep < Keep.ALL)):
                self.gate_up.fill_extra(n2, on.seed, number)
            if saved.gates is None:
                assert n2 is not None
                gates = self.gate_up.forward(n2)
            else:
                gates = saved.gates[rows]
            self._gates_backward(g[rows], gates, on, number, gradients)
            part = None if dn2 is None else dn2[rows]
            d = self.gate_up.backward(gates, n2, on.seed, gradients.gate_up, chunk=number, out=part)
            assert d is not None
            if part is None:
                dn2 = d
            elif d.data_ptr() != part.data_ptr():
                part.copy_(d)
        assert dn2 is not None
        weight = self.layer.mlp_norm.weight
        return norm.rms_norm_backward(dn2, saved.m, weight.detach(), saved.m_rstd, dresidual=g, out=dn2)

    def _gates_backward(self, g: Tensor, gates: Tensor, on: Pass, number: int, gradients: LayerGradients) -> None:
        """Overwrite gates [rows, 2 F] with their gradient."""
        gate, up = gates.chunk(2, dim=1)
        h = None
        if self.down.groups:
            h = self.down.input_buffer(g.shape[0])
            mlp.swiglu_forward(gate, up, out=h[:, : self.down.inputs])
            self.down.fill_extra(h, on.seed, number)
        dh = self.down.backward(g, h, on.seed, gradients.down, chunk=number)
        assert dh is not None
        mlp.swiglu_backward_(dh, gate, up)

    def _attention_backward(self, do: Tensor, saved: Saved, on: Pass) -> Tensor:
        """dqkv [T, (N + 2 K) D], of the projection's output."""
        assert saved.qkv is not None
        assert saved.o is not None
        q, k, v = self._split(saved.qkv)
        o, do = self._by_heads(saved.o[:, : self.o.inputs]), self._by_heads(do)
        tables = (on.rotary.cos, on.rotary.sin, on.position_ids)
        if saved.rotated is None:
            dq, dk, dv = self._attention(on).backward(do, q, k, v, o, saved.attention)
            return rope.merge_qkv_grad(dq, dk, dv, *tables).flatten(1)
        rotated_q, rotated_k, rstd = saved.rotated
        dq, dk, dv = self._attention(on).backward(do, rotated_q, rotated_k, v, o, saved.attention)
        q_norm, k_norm = self.layer.q_norm, self.layer.k_norm
        assert q_norm is not None
        assert k_norm is not None
        weights = (q_norm.weight.detach(), k_norm.weight.detach())
        return rope.qk_norm_rope_backward(dq, dk, dv, q, k, *weights, rstd, *tables).flatten(1)


def computations(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> list[LayerComputation | None]:
    """One for each layer of the model; None where the layer can't be fused."""
    scratch = Scratch()
    return [
        None if layer is None else LayerComputation(decoder, layer, dtype, device, scratch) for layer in decoder.layers
    ]
