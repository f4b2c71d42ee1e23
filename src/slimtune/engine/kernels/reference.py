"""The engine's operations in plain torch: the specification, the tests' oracle and the CPU path.

Every module beside this one offers functions of the same names and signatures, which run a Triton kernel on CUDA
tensors and these functions elsewhere. What holds for all of them:

- Shapes: T tokens of a micro-batch (documents flattened one after the other), H hidden size, F intermediate size,
  D head dimension, R rows of stacked LoRA A matrices, V vocabulary.
- Matrices over tokens may have any row stride, but neighbouring columns are neighbours in memory. An ``out`` may be
  such a view too, so that an operation can write straight into the columns of a wider buffer.
- 16-bit inputs are widened to float32, computed in float32 and rounded once, on writing. float32 and float64 inputs
  keep their dtype: in float64 these functions are the oracle.
- A name that ends in ``_`` overwrites an argument. Gradients of LoRA matrices are *added* to float32 buffers.
- Nothing here waits for the device, except the dropout mask and the optimizer's scalars, which this CPU path reads
  on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimtune.engine.kernels.formats import BLOCK, HALVES, ZERO_CODE, AdamWState, Pairs

__all__ = [
    "adamw_step_",
    "clip_factor",
    "dropout_keep",
    "global_norm",
    "lora_down",
    "lora_down_backward_",
    "lora_up_backward_",
    "loss_and_grad_",
    "merge_qkv_grad",
    "norm_backward",
    "norm_forward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "rope_",
]


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that is computed in: float32 for 16 bits, itself for 32 and 64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _store(value: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    """``value`` rounded to the dtype of ``like``, in ``out`` if there is one."""
    return value.to(like.dtype) if out is None else out.copy_(value)


# -- norms -------------------------------------------------------------------------------------------------------------


def norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    centred: bool = False,
    out: Tensor | None = None,
    out_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = s x rstd(s) x weight with s = x + residual, rounded to x's dtype before it is normalised.

    Args:
        x: [T, H].
        weight: [H].
        eps: Added to the mean square.
        residual: [T, H], added to x first.
        centred: s without its mean is normalised, as LayerNorm does.
        out: [T, H] that takes y.
        out_sum: [T, H] that takes s; may be ``residual`` or ``x`` itself.

    Returns:
        y [T, H]; s [T, H] (x itself without residual); rstd [T], float32 (float64 for float64).
    """
    total = x if residual is None else _store(_wide(x) + _wide(residual), x, out_sum)
    wide = _wide(total)
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return _store(wide * rstd[:, None] * weight, x, out), total, rstd


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    dresidual: Tensor | None = None,
    centred: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """dx [T, H] of :func:`norm_forward` for a frozen weight, plus ``dresidual``.

    Args:
        dy: [T, H].
        x: [T, H], what was normalised (s).
        weight: [H].
        rstd: [T], as the forward gave it.
        dresidual: [T, H], the gradient that reaches s on the residual path.
        centred: As in the forward.
        out: [T, H] that takes dx; may be ``dy`` or ``dresidual``.
    """
    g, wide = _wide(dy) * weight, _wide(x)
    if centred:
        g, wide = g - g.mean(-1, keepdim=True), wide - wide.mean(-1, keepdim=True)
    xhat = wide * rstd[:, None]
    dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[:, None]
    if dresidual is not None:
        dx = dx + _wide(dresidual)
    return _store(dx, dy, out)


# -- rotary position embedding ----------------------------------------------------------------------------------------


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, pairs: Pairs) -> Tensor:
    """x [T, heads, D] rotated, wide."""
    c, s = cos[position_ids][:, None], sin[position_ids][:, None]
    first, second = (index.to(x.device) for index in pairs.columns(x.shape[2]))
    a, b = _wide(x)[..., first], _wide(x)[..., second]
    turned = torch.empty_like(_wide(x))
    turned[..., first], turned[..., second] = a * c - b * s, b * c + a * s
    return turned


def rope_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
    *,
    inverse: bool = False,
) -> None:
    """Rotate q [T, heads, D] and k [T, kv_heads, D] in place, by the tables' rows at position_ids.

    Args:
        q: Queries; a view of a fused buffer will do (a token's heads are neighbours).
        k: Keys, likewise.
        cos: float32 [positions, D / 2].
        sin: float32 [positions, D / 2].
        position_ids: int64 [T].
        pairs: Which columns rotate against each other.
        inverse: Rotate back; it is the backward too, since a rotation's transpose is its inverse.
    """
    sin = -sin if inverse else sin
    q.copy_(_rotate(q, cos, sin, position_ids, pairs))
    k.copy_(_rotate(k, cos, sin, position_ids, pairs))


def merge_qkv_grad(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Attention's three gradients as one [T, heads + 2 kv_heads, D], dq and dk rotated back on the way.

    Args:
        dq: [T, heads, D].
        dk: [T, kv_heads, D].
        dv: [T, kv_heads, D].
        cos: float32 [positions, D / 2].
        sin: float32 [positions, D / 2].
        position_ids: int64 [T].
        pairs: As in the forward.
        out: Takes the result.
    """
    turned = [_rotate(d, cos, -sin, position_ids, pairs) for d in (dq, dk)]
    merged = torch.cat((*turned, _wide(dv)), dim=1)
    return _store(merged, dq, out)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Qwen3's attention inputs: RMS norm over each head of q and k, then the rotation.

    Args:
        q: [T, heads, D], kept for the backward.
        k: [T, kv_heads, D], kept for the backward.
        q_weight: [D].
        k_weight: [D].
        eps: Added to the mean square.
        cos: float32 [positions, D / 2].
        sin: float32 [positions, D / 2].
        position_ids: int64 [T].
        pairs: Which columns rotate against each other.

    Returns:
        q and k, normalised and rotated, contiguous; rstd [T, heads + kv_heads] in float32 (float64 for float64).
    """
    results, rstds = [], []
    for x, weight in ((q, q_weight), (k, k_weight)):
        wide = _wide(x)
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
        results.append(_rotate(wide * rstd[..., None] * weight, cos, sin, position_ids, pairs).to(x.dtype))
        rstds.append(rstd)
    return results[0], results[1], torch.cat(rstds, dim=1)


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`qk_norm_rope`'s inputs and dv as one [T, heads + 2 kv_heads, D]; the weights are frozen.

    Args:
        dq: [T, heads, D], the gradient of the rotated queries.
        dk: [T, kv_heads, D].
        dv: [T, kv_heads, D].
        q: [T, heads, D], as :func:`qk_norm_rope` took it.
        k: [T, kv_heads, D].
        q_weight: [D].
        k_weight: [D].
        rstd: [T, heads + kv_heads].
        cos: float32 [positions, D / 2].
        sin: float32 [positions, D / 2].
        position_ids: int64 [T].
        pairs: As in the forward.
        out: Takes the result.
    """
    heads = q.shape[1]
    parts = []
    for d, x, weight, r in ((dq, q, q_weight, rstd[:, :heads]), (dk, k, k_weight, rstd[:, heads:])):
        g, xhat = _rotate(d, cos, -sin, position_ids, pairs) * weight, _wide(x) * r[..., None]
        parts.append((g - xhat * (g * xhat).mean(-1, keepdim=True)) * r[..., None])
    return _store(torch.cat((*parts, _wide(dv)), dim=1), dq, out)


# -- LoRA --------------------------------------------------------------------------------------------------------------

_MASK32 = 0xFFFFFFFF
_GROUP_FACTORS = (1, 0x9E3779B1, 0x85EBCA77)
"""A group's draws are the first group's times this, modulo 2^32 (xxHash's primes)."""


def _mix(x: int) -> int:
    """lowbias32 on a host integer: a bijection of 32 bits (Wellons, github.com/skeeto/hash-prospector)."""
    x ^= x >> 16
    x = x * 0x21F0AAAD & _MASK32
    x ^= x >> 15
    x = x * 0xD35A2D97 & _MASK32
    return x ^ x >> 15


def _int32(x: int) -> int:
    """The signed integer with x's 32 bits."""
    return x - (1 << 32) if x >= 1 << 31 else x


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits) for int32 taken as unsigned, in place."""
    return x.bitwise_xor_(x.bitwise_right_shift(bits).bitwise_and_((1 << (32 - bits)) - 1))


def _mixed_range(size: int, key: int, device: torch.device) -> Tensor:
    """:func:`_mix` of (0 … size - 1) ^ key, int32 [size]."""
    x = torch.arange(size, dtype=torch.int32, device=device).bitwise_xor_(_int32(key))
    x = _xor_shift(_xor_shift(x, 16).mul_(0x21F0AAAD), 15)
    return _xor_shift(x.mul_(_int32(0xD35A2D97)), 15)


def dropout_threshold(dropout: float) -> int:
    """Of 2^32 equally likely draws, how many drop an element."""
    return round(dropout * 2**32)


def dropout_scale(dropout: float) -> float:
    """What the elements that are kept are multiplied with."""
    return 2**32 / (2**32 - dropout_threshold(dropout))


def stream_key(stream: int) -> int:
    """The stream's share of the keys, 32 bits."""
    return stream * 0x9E3779B1 & _MASK32


def dropout_keep(shape: tuple[int, int], groups: int, dropout: float, seed: Tensor, stream: int) -> list[Tensor]:
    """The masks of :func:`lora_down`: for each group a bool [T, H], True where an element is kept.

    Counter-based, so that the backward or a recompute draws the same masks again with nothing saved. Row and column
    are each mixed well under a key made of ``seed`` and ``stream``, once; what is left for an element are a few
    instructions: the two keys' exclusive or, a multiplication, a shift, and a multiplication for each further group.
    """
    value = int(seed)
    key0 = _mix((value & _MASK32) ^ _mix((value >> 32 & _MASK32) ^ stream_key(stream)))
    key1 = _mix(key0 ^ 0x9E3779B9)
    rows, columns = (_mixed_range(n, key, seed.device) for n, key in zip(shape, (key0, key1), strict=True))
    draws = _xor_shift((rows[:, None] ^ columns[None, :]).mul_(0x21F0AAAD), 15)
    # int32 compares as unsigned once the sign bits are flipped.
    limit = _int32(dropout_threshold(dropout) ^ 1 << 31)
    return [draws.mul(_int32(f)).bitwise_xor_(-(1 << 31)) >= limit for f in _GROUP_FACTORS[:groups]]


def _masks(x: Tensor, groups: int, dropout: float, seed: Tensor | None, stream: int) -> list[Tensor]:
    if seed is None:
        raise ValueError("dropout needs a seed")
    if groups > len(_GROUP_FACTORS):
        raise ValueError(f"{groups} adapters on one input with dropout; masks are drawn for {len(_GROUP_FACTORS)}")
    rows, columns = x.shape
    return dropout_keep((rows, columns), groups, dropout, seed, stream)


def lora_down(
    x: Tensor,
    a: Tensor,
    *,
    groups: int = 1,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    out: Tensor | None = None,
    ones: bool = False,
    copy: Tensor | None = None,
) -> Tensor:
    """u = dropout(x) Aᵀ for the adapters that share an input, each with a dropout mask of its own.

    Args:
        x: [T, H].
        a: [R, H], the adapters' A stacked (q, k, v: R = 3 r); any float dtype, rounded to x's before the product.
        groups: Adapters in the stack, at most three with dropout; each has R / groups rows.
        dropout: Share of x's elements that an adapter drops.
        seed: int64 scalar tensor; another for each micro-batch.
        stream: Another for each call in a micro-batch that needs masks of its own.
        out: [T, R] that takes u, or wider: the columns after u become zero.
        ones: The column after u becomes one instead (it multiplies a bias).
        copy: [T, H] that takes x itself on the way.

    Returns:
        u [T, R] in x's dtype, or ``out``.
    """
    wide, rounded = _wide(x), _wide(a.to(x.dtype))
    if copy is not None:
        copy.copy_(x)
    if dropout == 0.0:
        u = wide @ rounded.T
    else:
        keeps = _masks(x, groups, dropout, seed, stream)
        u = torch.cat([(wide * keep) @ part.T for keep, part in zip(keeps, rounded.chunk(groups), strict=True)], dim=1)
        u *= dropout_scale(dropout)
    if out is None:
        return u.to(x.dtype)
    out[:, u.shape[1] :] = 0.0
    if ones:
        out[:, u.shape[1]] = 1.0
    out[:, : u.shape[1]] = u
    return out


def lora_down_backward_(
    du: Tensor,
    x: Tensor,
    a: Tensor,
    *,
    da: Tensor | None,
    dx: Tensor | None,
    groups: int = 1,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> None:
    """Backward of :func:`lora_down` with the same arguments: adds to da and to dx.

    Args:
        du: [T, R].
        x: [T, H], as the forward took it.
        a: [R, H], as the forward took it.
        da: float32 [R, H]; duᵀ dropout(x) is added to it.
        dx: [T, H] in x's dtype; dropout'(du A) is added to it (the frozen product's dX stands there already).
        groups: As in the forward.
        dropout: As in the forward.
        seed: As in the forward.
        stream: As in the forward.
    """
    wide, wide_du, rounded = _wide(x), _wide(du), _wide(a.to(x.dtype))
    if dropout == 0.0:
        if da is not None:
            da.add_(wide_du.T @ wide)
        if dx is not None:
            dx.copy_(_wide(dx) + wide_du @ rounded)
        return
    scale = dropout_scale(dropout)
    keeps = _masks(x, groups, dropout, seed, stream)
    du_parts, a_parts = wide_du.chunk(groups, dim=1), rounded.chunk(groups)
    if da is not None:
        for target, du_part, keep in zip(da.chunk(groups), du_parts, keeps, strict=True):
            target.add_(du_part.T @ (wide * keep), alpha=scale)
    if dx is not None:
        parts = zip(du_parts, a_parts, keeps, strict=True)
        dx.copy_(_wide(dx) + scale * sum((du_part @ a_part) * keep for du_part, a_part, keep in parts))


def lora_up_backward_(
    dy: Tensor, u: Tensor, scaling: float, *, db: Tensor, outputs: Sequence[int] | None = None
) -> None:
    """Add scaling x dyᵀ u to db.

    Args:
        dy: [T, out_features], the gradient of the adapted layer's output.
        u: [T, r], as :func:`lora_down` gave it.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        db: float32 [out_features, r].
        outputs: For several adapters of one rank side by side, the out_features of each: dy is [T, their sum], u [T,
            r x their number], db [their sum, r].
    """
    rank, start = db.shape[1], 0
    for index, width in enumerate(outputs or (dy.shape[1],)):
        columns = slice(start, start + width)
        db[columns].add_(_wide(dy[:, columns]).T @ _wide(u[:, index * rank : (index + 1) * rank]), alpha=scaling)
        start += width


# -- loss --------------------------------------------------------------------------------------------------------------


def loss_and_grad_(logits: Tensor, targets: Tensor, scale: Tensor | float, *, softcap: float | None = None) -> Tensor:
    """Cross-entropy: overwrite logits with their gradient, give the loss's sum.

    Args:
        logits: [N, V]; becomes (softmax - onehot(target)) x scale, zero in the rows without a target.
        targets: int64 [N]; -100 where there is none.
        scale: What the caller divides by and multiplies with (1 / supervised tokens, the loss scale), on the device
            or the host.
        softcap: The loss is that of softcap x tanh(logits / softcap).

    Returns:
        Sum over rows of -log softmax(logits)[target], not scaled; float32 scalar (float64 for float64).
    """
    known = targets >= 0
    index = targets.clamp(min=0)[:, None]
    bent = None if softcap is None else torch.tanh(_wide(logits) / softcap)
    # Not logsumexp: z - logsumexp(z) loses its digits where logits are large.
    log_probs = torch.log_softmax(_wide(logits) if bent is None or softcap is None else bent * softcap, dim=-1)
    loss = -torch.where(known, log_probs.gather(1, index)[:, 0], 0.0).sum()
    grad = log_probs.exp_()
    grad.scatter_add_(1, index, torch.full_like(grad[:, :1], -1.0))
    if bent is not None:
        grad *= 1 - bent * bent
    logits.copy_(torch.where(known[:, None], grad * scale, 0.0))
    return loss


# -- gradient ----------------------------------------------------------------------------------------------------------


def global_norm(grads: Tensor) -> Tensor:
    """2-norm of the flat gradient, a scalar tensor."""
    norm: Tensor = torch.linalg.vector_norm(grads)
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """What gradients of this norm are multiplied with, and whether any of them is not finite; nothing waits.

    The factor is ``clip_grad_norm_``'s: min(1, max_norm / (norm + 1e-6)).

    Returns:
        The factor, 1 where the norm isn't finite; the flag, a bool scalar tensor.
    """
    nonfinite = ~torch.isfinite(norm)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return torch.where(nonfinite, 1.0, factor), nonfinite


# -- 8-bit AdamW -------------------------------------------------------------------------------------------------------


def _quantize(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes of [blocks, 256] and each block's absmax; a block of zeros has code 0, as it starts."""
    absmax = values.abs().amax(-1)
    scaled = values * (1.0 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)
    return torch.where(absmax[:, None] > 0, codes, 0).to(torch.uint8), absmax


def adamw_step_(
    params: Tensor,
    grads: Tensor,
    state: AdamWState,
    *,
    lr: Tensor,
    step: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One AdamW step over all tensors, with bitsandbytes' blockwise 8-bit state (Dettmers et al. 2021, 2110.02861).

    m and v are decoded, updated in float32 and encoded again; the parameters use the float32 values:
    p -= lr x (weight_decay x p + m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)).

    Args:
        params: float32 [N], laid out by :func:`aligned_offsets`; updated.
        grads: float32 [N].
        state: Updated.
        lr: float32 scalar tensor.
        step: int64 scalar tensor, 1 for the first step.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        grad_scale: float32 scalar tensor that gradients are multiplied with first (clipping, loss scale).
        skip: bool scalar tensor; True leaves everything as it is.
    """
    if skip is not None and bool(skip):
        return
    rate, t = float(lr), int(step)
    beta1, beta2 = betas
    correction1, correction2 = 1.0 - beta1**t, math.sqrt(1.0 - beta2**t)
    g = (grads if grad_scale is None else grads * grad_scale).view(-1, BLOCK)
    p = params.view(-1, BLOCK)
    if weight_decay > 0.0:
        p.mul_(1.0 - rate * weight_decay)

    coded = torch.nonzero(state.small < 0)[:, 0]
    codes1, codes2 = state.codes1.view(-1, BLOCK), state.codes2.view(-1, BLOCK)
    m = state.map1[codes1[coded].int()] * state.absmax1[coded, None]
    v = state.map2[codes2[coded].int()] * state.absmax2[coded, None]
    m.mul_(beta1).add_(g[coded], alpha=1.0 - beta1)
    v.mul_(beta2).addcmul_(g[coded], g[coded], value=1.0 - beta2)
    p[coded] = p[coded].addcdiv_(m, (v.sqrt() / correction2).add_(eps), value=-rate / correction1)
    encoded, state.absmax1[coded] = _quantize(m, state.map1)
    # A negative moment never becomes zero, so that its sign lives on (bitsandbytes' CUDA kernel does the same).
    codes1[coded] = encoded - ((encoded == ZERO_CODE) & (m < 0)).to(torch.uint8)
    codes2[coded], state.absmax2[coded] = _quantize(v, state.map2)

    exact = torch.nonzero(state.small >= 0)[:, 0]
    m, v = state.exact1, state.exact2
    m.mul_(beta1).add_(g[exact], alpha=1.0 - beta1)
    v.mul_(beta2).addcmul_(g[exact], g[exact], value=1.0 - beta2)
    update = m / (v.sqrt() + eps * correction2)
    p[exact] = p[exact].add_(update, alpha=-rate * correction2 / correction1)
