"""Attention by plain products: the specification of :mod:`slimtune.engine.kernels.attention` and the tests' oracle.

A query i of a document sees its keys j ≤ i, with a sliding window only i - window < j. With x = scale · q·k:

    s = x, or with a soft cap: cap · tanh(x / cap)
    l = log(Σ exp(s)), or with a sink: log(Σ exp(s) + exp(sink))
    p = exp(s - l)        o = Σ p v

A sink is one logit a query head that takes its share of the softmax and gives no value; it is frozen here. l holds it,
so the backward is the same with and without: dp = do·v, ds = p (dp - do·o), dx = ds, or with a soft cap
ds (1 - (s / cap)²).

Sources: Gemma 2 (arXiv:2408.00118) for soft caps, gpt-oss's model card (arXiv:2508.10925) for sinks, both as
Transformers' ``eager_attention_forward`` has them; Dao et al. 2022 (arXiv:2205.14135) for the backward.

Shapes: T tokens, N heads, K kv heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_many_heads", "attention_backward", "attention_forward", "hidden_in", "plain_backward", "plain_forward"]


def hidden_in(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: which keys a query of a document doesn't see."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [..., N, L, D] and its logsumexp [..., N, L] of q, k and v [..., N, L, D].

    Products are made in the inputs' dtype, the softmax in float32 at least.

    Args:
        q: Queries.
        k: Keys, as many heads as q.
        v: Values, likewise.
        hidden: bool [L, L], what isn't seen.
        scale: What q·k is multiplied with.
        softcap: The soft cap, or None.
        sinks: [N], or None.
    """
    scores, _ = _scores(q, k, scale, softcap)
    scores = scores.masked_fill(hidden, -torch.inf)
    logsumexp = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        logsumexp = torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype)[:, None])
    return torch.exp(scores - logsumexp[..., None]).to(q.dtype) @ v, logsumexp


def plain_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    hidden: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv [..., N, L, D] of what :func:`plain_forward` computed; the logsumexp holds the sinks."""
    scores, slope = _scores(q, k, scale, softcap)
    p = torch.exp(scores.masked_fill(hidden, -torch.inf) - logsumexp[..., None]).to(q.dtype)
    ds = p * (do @ v.transpose(-2, -1) - (do * o).sum(-1, keepdim=True)) * scale
    if slope is not None:
        ds = ds * slope.to(ds.dtype)
    return ds @ k, ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ do


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The scores, and with a soft cap their derivative by q·k · scale."""
    x = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is None:
        return x, None
    bent = torch.tanh(x / softcap)
    return softcap * bent, 1 - bent * bent


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document: o [T, N, D], and its logsumexp [N, T] in float32 (float64 for float64).

    Args:
        q: [T, N, D] with any strides over tokens and heads.
        k: [T, K, D], likewise; each of its heads serves N / K neighbouring query heads.
        v: [T, K, D], likewise.
        boundaries: int32 [n + 1 or more] on the device: 0, then each document's end; may go on repeating T.
        scale: What q·k is multiplied with.
        window: Sliding window in tokens, the query's own among them; None: all before.
        softcap: Scores are softcap · tanh(score / softcap); None: as they are.
        sinks: [N], one logit a query head, or None.
    """
    q_, k_, v_ = (_by_heads(x, q.shape[1]) for x in (q, k, v))
    hidden = _hidden(q, boundaries, window)
    o, logsumexp = plain_forward(q_, k_, v_, hidden, scale=scale, softcap=softcap, sinks=sinks)
    return o.transpose(0, 1).to(q.dtype).contiguous(), logsumexp


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    boundaries: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, N, D], dk and dv [T, K, D] from do [T, N, D] and what :func:`attention_forward` gave."""
    do_, q_, k_, v_, o_ = (_by_heads(x, q.shape[1]) for x in (do, q, k, v, o))
    hidden = _hidden(q, boundaries, window)
    dq, dk, dv = plain_backward(do_, q_, k_, v_, o_, logsumexp, hidden, scale=scale, softcap=softcap)
    dk, dv = (x.view(k.shape[1], -1, *x.shape[1:]).sum(1) for x in (dk, dv))
    made = [x.transpose(0, 1).to(q.dtype).contiguous() for x in (dq, dk, dv)]
    return made[0], made[1], made[2]


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """[T, heads or fewer, D] as [heads, T, D] in float32 at least."""
    return as_many_heads(x, heads).transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _hidden(q: Tensor, boundaries: Tensor, window: int | None) -> Tensor:
    """bool [T, T]: what isn't in the query's document, or not seen there."""
    tokens = torch.arange(q.shape[0], device=q.device)
    document = torch.searchsorted(boundaries.long().contiguous(), tokens, right=True)
    return hidden_in(q.shape[0], window, q.device) | (document[:, None] != document)


def as_many_heads(x: Tensor, heads: int) -> Tensor:
    """[T, heads or fewer, D] as [T, heads, D]; kv heads are repeated for their query heads."""
    if x.shape[1] == heads:
        return x
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).reshape(x.shape[0], heads, x.shape[2])
