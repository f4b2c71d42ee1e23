"""The gated delta rule and the short convolution before it, in plain torch, by the rules of
:mod:`slimtune.engine.kernels.reference`.

A head's state S [Dk, Dv] takes one token after the other, and is zero where a document starts:

    S_t = exp(g_t) S_{t-1} + k_t d_tᵀ      d_t = beta_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)      o_t = S_tᵀ q_t

k is normalised to length 1 and q to Dk^-1/2 (Yang et al. 2025, arXiv:2412.06464, as Transformers' Qwen3-Next has it).
:func:`recurrent` is that. The others compute the same in chunks of :data:`CHUNK` tokens. With G the sum of g over a
document's tokens in the chunk, Γ_ij = exp(G_i - G_j) for two tokens i >= j of one document, else 0, and E_i = exp(G_i)
for tokens of the document that reaches into the chunk from before, else 0:

    A = strictly lower beta Γ k kᵀ      T = (1 + A)⁻¹      P = lower Γ q kᵀ      q' = E q      k' = E beta k
    D = T (beta v - k' S)      o = q' S + P D      S_next = c S + K̃ᵀ D

where S is the state that the chunk begins with, c = E_last and K̃_j = Γ_last,j k_j for the chunk's last token. So chunks
lie where they lie, whatever documents there are: T / 64 of them.

Shapes: T tokens, K key heads of Dk columns, V value heads of Dv, V a multiple of K; mixed [T, 2 K Dk + V Dv]: all q,
all k, all v. ``starts``, int [T], holds the first token of each token's document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.engine.kernels.reference import _store as store
from slimtune.engine.kernels.reference import _wide as wide

__all__ = [
    "CHUNK",
    "DeltaHeads",
    "DeltaSaved",
    "conv_silu_backward",
    "conv_silu_forward",
    "delta_backward",
    "delta_forward",
    "recurrent",
]

CHUNK = 64
"""Tokens that are computed at once."""
_EPS = 1e-6
"""Added to the squares of q and of k before they are normalised."""


class DeltaHeads(NamedTuple):
    """How many heads there are, and how wide they are."""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def columns(self) -> list[int]:
        """Of all q, all k and all v."""
        return [self.keys * self.key_dim, self.keys * self.key_dim, self.values * self.value_dim]


class DeltaSaved(NamedTuple):
    """What the backward needs beside the inputs; in float32, or float64 for float64. N chunks."""

    states: Tensor
    """S [N, V, Dk, Dv]."""
    inverse: Tensor
    """T [N, V, CHUNK, CHUNK]."""
    delta: Tensor
    """D [N, V, CHUNK, Dv]."""

    @staticmethod
    def nbytes(tokens: int, heads: DeltaHeads, itemsize: int) -> int:
        """Bytes of all three for so many tokens, with numbers of so many bytes."""
        chunks = -(-tokens // CHUNK) * heads.values
        return chunks * itemsize * (heads.key_dim * heads.value_dim + CHUNK * (CHUNK + heads.value_dim))


# -- the specification -------------------------------------------------------------------------------------------------


def recurrent(mixed: Tensor, g: Tensor, beta: Tensor, starts: Tensor, heads: DeltaHeads) -> Tensor:
    """o [T, V Dv], token by token; autograd goes through it.

    Args:
        mixed: [T, 2 K Dk + V Dv].
        g: [T, V], the logarithms of the decays, 0 or less.
        beta: [T, V], between 0 and 1.
        starts: [T].
        heads: The heads.
    """
    q, k, v = _split(wide(mixed), heads)
    q, k = (x * (x.square().sum(-1, keepdim=True) + _EPS).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(heads.values // heads.keys, dim=1) for x in (q * heads.key_dim**-0.5, k))
    state, results = q.new_zeros(heads.values, heads.key_dim, heads.value_dim), []
    for t in range(len(mixed)):
        decayed = state * wide(g)[t].exp()[:, None, None] if int(starts[t]) < t else torch.zeros_like(state)
        d = wide(beta)[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", decayed, k[t]))
        state = decayed + k[t, :, :, None] * d[:, None, :]
        results.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(results).flatten(1).to(mixed.dtype)


def _split(mixed: Tensor, heads: DeltaHeads) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [T, K, Dk], v [T, V, Dv]: views."""
    q, k, v = torch.split(mixed, heads.columns, dim=1)
    keys, values = (-1, heads.keys, heads.key_dim), (-1, heads.values, heads.value_dim)
    return q.view(keys), k.view(keys), v.view(values)


# -- in chunks ---------------------------------------------------------------------------------------------------------


class _Chunks:
    """What all chunks know of themselves before any state is known; [N, V, CHUNK, …] each."""

    def __init__(self, mixed: Tensor, g: Tensor, beta: Tensor, starts: Tensor, heads: DeltaHeads) -> None:
        self.heads, self.tokens, tokens = heads, len(mixed), torch.arange(len(mixed), device=mixed.device)
        q, k, v = (wide(x) for x in _split(mixed, heads))
        self.q_scale, self.k_scale = ((x.square().sum(-1, keepdim=True) + _EPS).rsqrt() for x in (q, k))
        self.q = self.by_chunk(self.shared(q * self.q_scale * heads.key_dim**-0.5))
        self.k = self.by_chunk(self.shared(k * self.k_scale))
        self.v, self.beta = self.by_chunk(v), self.by_chunk(wide(beta)[..., None])
        # Padding follows the last token's document and adds nothing to it.
        first = torch.nn.functional.pad(starts.long(), (0, -self.tokens % CHUNK))
        first = torch.where(torch.arange(len(first), device=first.device) < self.tokens, first, starts[-1].long())
        first, base = first.view(-1, 1, CHUNK, 1), tokens[::CHUNK].view(-1, 1, 1, 1)
        self.together = (first == first.transpose(2, 3)).tril()
        total = self.within(self.by_chunk(wide(g)[..., None]))
        last, earlier = total[:, :, -1:], first < base
        self.gamma = (total - total.transpose(2, 3)).masked_fill(~self.together, -torch.inf).exp()
        self.e = total.exp() * earlier
        self.carry = (last.exp() * earlier[:, :, -1:])[..., 0, 0]
        self.to_last = self.gamma[:, :, -1:].transpose(2, 3)
        self.strict = self.gamma.tril(-1)
        self.products = self.k @ self.k.transpose(2, 3)

    def within(self, x: Tensor, *, back: bool = False) -> Tensor:
        """x [N, V, CHUNK, 1] summed up within each document's part of a chunk; its transpose if ``back``."""
        kept = self.together.transpose(2, 3) if back else self.together
        return torch.where(kept, x.transpose(2, 3), 0).sum(-1, keepdim=True)

    def by_chunk(self, x: Tensor) -> Tensor:
        """[T, V, columns] as [N, V, CHUNK, columns], zeros behind the last token."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -self.tokens % CHUNK))
        return padded.view(-1, CHUNK, *x.shape[1:]).transpose(1, 2)

    def by_token(self, x: Tensor) -> Tensor:
        """Back again."""
        return x.transpose(1, 2).flatten(0, 1)[: self.tokens].contiguous()

    def shared(self, x: Tensor) -> Tensor:
        """[T, K, Dk] as [T, V, Dk]: neighbouring value heads share a key head."""
        return x.repeat_interleave(self.heads.values // self.heads.keys, dim=1)

    def inverse(self) -> Tensor:
        """T."""
        lower = self.beta * self.strict * self.products
        inverse = torch.eye(CHUNK, dtype=lower.dtype, device=lower.device).expand_as(lower)
        if not lower.is_cuda:
            solved: Tensor = torch.linalg.solve_triangular(lower + inverse, inverse, upper=False, unitriangular=True)
            return solved
        # By products alone, which a CUDA graph takes: blocks of 1, 2, 4, … rows are inverted two by two.
        row = torch.arange(CHUNK, device=lower.device)
        i, j = row[:, None], row[None, :]
        for size in (1 << level for level in range(CHUNK.bit_length() - 1)):
            pair = 2 * size
            below = (i // pair == j // pair) & (i % pair >= size) & (j % pair < size)
            inverse = inverse - inverse @ torch.where(below, lower, 0) @ inverse
        return inverse


def delta_forward(
    mixed: Tensor, g: Tensor, beta: Tensor, starts: Tensor, boundaries: Tensor, heads: DeltaHeads
) -> tuple[Tensor, DeltaSaved]:
    """o [T, V Dv] in mixed's dtype, and what the backward needs; arguments as :func:`recurrent`'s.

    ``boundaries``, int32 [n + 1 or more], repeats what ``starts`` says: 0, then each document's end, then T again.
    """
    chunks = _Chunks(mixed, g, beta, starts, heads)
    inverse, values, keys = chunks.inverse(), chunks.beta * chunks.v, chunks.e * chunks.beta * chunks.k
    onward, states, delta = (chunks.to_last * chunks.k).transpose(2, 3), [], []
    state = values.new_zeros(heads.values, heads.key_dim, heads.value_dim)
    for n in range(len(values)):
        states.append(state)
        delta.append(inverse[n] @ (values[n] - keys[n] @ state))
        state = chunks.carry[n, :, None, None] * state + onward[n] @ delta[n]
    saved = DeltaSaved(torch.stack(states), inverse, torch.stack(delta))
    o = (chunks.e * chunks.q) @ saved.states + (chunks.gamma * (chunks.q @ chunks.k.transpose(2, 3))) @ saved.delta
    return chunks.by_token(o).flatten(1).to(mixed.dtype), saved


def delta_backward(
    do: Tensor,
    mixed: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor,
    boundaries: Tensor,
    heads: DeltaHeads,
    saved: DeltaSaved,
) -> tuple[Tensor, Tensor, Tensor]:
    """dmixed [T, 2 K Dk + V Dv] in mixed's dtype, dg and dbeta [T, V] in float32 or float64.

    Args:
        do: [T, V Dv].
        mixed: The forward's, as the others.
        g: [T, V].
        beta: [T, V].
        starts: [T].
        boundaries: [n + 1 or more].
        heads: The heads.
        saved: What the forward gave.
    """
    chunks = _Chunks(mixed, g, beta, starts, heads)
    do = chunks.by_chunk(wide(do).reshape(-1, heads.values, heads.value_dim))
    p = chunks.gamma * (chunks.q @ chunks.k.transpose(2, 3))
    queries, keys, onward = chunks.e * chunks.q, chunks.e * chunks.beta * chunks.k, chunks.to_last * chunks.k
    through, back = p.transpose(2, 3) @ do, saved.inverse.transpose(2, 3)
    dstate = torch.zeros_like(saved.states[0])
    dlast, dvalues = [dstate] * len(do), [do[0]] * len(do)
    for n in range(len(do) - 1, -1, -1):
        dlast[n] = dstate
        dvalues[n] = back[n] @ (through[n] + onward[n] @ dstate)
        dstate = (
            queries[n].transpose(1, 2) @ do[n]
            - keys[n].transpose(1, 2) @ dvalues[n]
            + chunks.carry[n, :, None, None] * dstate
        )
    return _gradients(chunks, do, torch.stack(dvalues), torch.stack(dlast), p, saved, mixed)


def _gradients(
    chunks: _Chunks, do: Tensor, dvalues: Tensor, dlast: Tensor, p: Tensor, saved: DeltaSaved, mixed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every chunk's own part, from the gradients of beta v and of the state that it ends with."""
    q, k, beta, states = chunks.q, chunks.k, chunks.beta, saved.states
    dp = do @ saved.delta.transpose(2, 3)
    da = -dvalues @ saved.delta.transpose(2, 3)
    dqueries, dkeys = do @ states.transpose(2, 3), -dvalues @ states.transpose(2, 3)
    donward = saved.delta @ dlast.transpose(2, 3)
    of_products, by_p = beta * chunks.strict * da, chunks.gamma * dp
    dq = chunks.e * dqueries + by_p @ k
    dk = (
        by_p.transpose(2, 3) @ q
        + (of_products + of_products.transpose(2, 3)) @ k
        + chunks.e * beta * dkeys
        + chunks.to_last * donward
    )
    lower = chunks.strict * chunks.products * da
    dbeta = lower.sum(-1, keepdim=True) + _dot(dvalues, chunks.v) + chunks.e * _dot(dkeys, k)
    decays = p * dp + beta * lower
    left = chunks.to_last * _dot(donward, k)
    dtotal = decays.sum(-1, keepdim=True) - decays.sum(-2)[..., None] - left
    dtotal = dtotal + chunks.e * (_dot(dqueries, q) + beta * _dot(dkeys, k))
    at_end = left.sum(2) + chunks.carry[..., None] * (states * dlast).sum((2, 3))[..., None]
    dtotal = torch.cat((dtotal[:, :, :-1], dtotal[:, :, -1:] + at_end[:, :, None]), dim=2)
    dg = chunks.within(dtotal, back=True)
    dmixed = torch.cat(
        (
            _unnormalised(chunks, dq, q, chunks.q_scale, chunks.heads.key_dim**-0.5),
            _unnormalised(chunks, dk, k, chunks.k_scale, 1.0),
            chunks.by_token(beta * dvalues).flatten(1),
        ),
        dim=1,
    )
    return dmixed.to(mixed.dtype), chunks.by_token(dg)[..., 0], chunks.by_token(dbeta)[..., 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _unnormalised(chunks: _Chunks, d: Tensor, x: Tensor, scale: Tensor, length: float) -> Tensor:
    """The gradient [T, K Dk] of q or k before it was given this length."""
    heads = chunks.heads
    many = -1, heads.keys, heads.values // heads.keys, heads.key_dim
    d = chunks.by_token(d).view(many).sum(2)
    unit = chunks.by_token(x).view(many)[:, :, 0] / length
    return (length * scale * (d - unit * _dot(d, unit))).flatten(1)


# -- the short convolution ---------------------------------------------------------------------------------------------


def _taps(x: Tensor, starts: Tensor, taps: int) -> list[Tensor]:
    """x [T, C] of each token's 0, 1, … tokens before, zeros where those aren't of its document."""
    reach = torch.arange(len(x), device=x.device) - starts
    return [torch.where(reach[:, None] >= back, x.roll(back, 0), 0) for back in range(taps)]


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """silu(a causal convolution of each column alone) [T, C], inside each document.

    Args:
        x: [T, C].
        weight: [C, taps]; the last one is a token's own.
        bias: [C].
        starts: [T].
    """
    pre = _convolved(x, weight, bias, starts)
    return store(pre * torch.sigmoid(pre), x, None)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    pre = torch.zeros_like(wide(x)) if bias is None else wide(bias).to(wide(x).dtype).expand(x.shape)
    for back, shifted in enumerate(_taps(wide(x), starts, weight.shape[1])):
        pre = pre + shifted * weight[:, -1 - back].to(shifted.dtype)
    return pre


def conv_silu_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """dx [T, C]; the convolution is computed again."""
    pre = _convolved(x, weight, bias, starts)
    sigma = torch.sigmoid(pre)
    dpre = wide(dy) * sigma * (1 + pre * (1 - sigma))
    reach, dx = torch.arange(len(x), device=x.device) - starts, torch.zeros_like(dpre)
    for back in range(weight.shape[1]):
        reached = torch.where(reach[:, None] >= back, dpre * weight[:, -1 - back].to(dpre.dtype), 0)
        dx = dx + reached.roll(-back, 0)
    return store(dx, x, None)
