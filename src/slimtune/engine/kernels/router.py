"""A router's choice: scores of its logits, the best k experts, their weights, and the weights' backward.

Forward, for a token's logits z: s = softmax(z) or σ(z); the experts i_1 … i_k with the highest s + bias, from the
groups that are kept; w_j = c · s_{i_j}, divided by n = Σ_j s_{i_j} + ε if it renormalises. Softmax over the chosen
logits alone is the same as softmax over all, renormalised. Backward: with d_j = c · dw_j, and if renormalised
d_j ← (d_j - Σ_l d_l s_{i_l} / n) / n, ds is d_j at i_j and 0 elsewhere; dz = s · (ds - Σ ds · s) for softmax,
ds · s · (1 - s) for sigmoid.

Layout: logits [T, E] with any row stride. One program takes a token, its experts as [groups, members] in registers;
what is chosen is taken out k times. E up to some thousand.

Source: Transformers' ``Qwen3MoeTopKRouter``, ``MixtralTopKRouter``, ``GptOssTopKRouter``, ``GraniteMoeTopKRouter``,
``Gemma4TextRouter``; groups and correction bias as in DeepSeek-V3 (arXiv:2412.19437, equations 12 to 16).

Dtype traps: Transformers rounds the weights to the hidden dtype for some of these, and computes gpt-oss' softmax in the
logits' dtype; here they stay float32. Equal logits are common in 16 bits: the lower expert wins here, which
``torch.topk`` leaves open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_router as reference
from slimtune.engine.kernels._triton import jit, pow2, runs_on_triton, tl
from slimtune.engine.kernels.reference_router import Choice

__all__ = ["Choice", "choose", "choose_backward"]


@jit
def _scores(z: tl.tensor, SIGMOID: tl.constexpr) -> tl.tensor:
    """Of a token's logits in one dimension; -inf where there is no expert."""
    if SIGMOID:
        score = tl.sigmoid(z)
    else:
        score = tl.exp(z - tl.max(z, axis=0))
        score /= tl.sum(score, axis=0)
    return score


@jit
def _close_groups(ranked: tl.tensor, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr) -> tl.tensor:
    """ranked [groups, members] with -inf in all groups but the KEPT best."""
    group = tl.arange(0, ranked.shape[0])
    member = tl.arange(0, ranked.shape[1])
    value = tl.max(ranked, axis=1)
    if BEST == 2:
        first = tl.argmax(ranked, axis=1)
        value += tl.max(tl.where(member[None, :] == first[:, None], float("-inf"), ranked), axis=1)
    value = tl.where(group < GROUPS, value, float("-inf"))
    kept = group < 0
    for _ in tl.static_range(KEPT):
        best = group == tl.argmax(value, axis=0)
        kept = kept | best
        value = tl.where(best, float("-inf"), value)
    return tl.where(kept[:, None], ranked, float("-inf"))


@jit
def _choose(
    logits: tl.tensor,
    bias: tl.tensor,
    expert_scale: tl.tensor,
    weights: tl.tensor,
    experts: tl.tensor,
    stride: int,
    scaling: float,
    epsilon: float,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_P: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS_P: tl.constexpr,
    SIZE_P: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, GROUPS_P * SIZE_P)
    expert = position // SIZE_P * SIZE + position % SIZE_P
    inside = (position // SIZE_P < GROUPS) & (position % SIZE_P < SIZE)
    z = tl.load(logits + token * stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    score = _scores(z, SIGMOID)
    ranked = score
    if BIASED:
        ranked += tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32)
    # Not a number is the worst, so that what is chosen is always an expert.
    ranked = tl.where(inside & (ranked == ranked), ranked, float("-inf"))
    if KEPT < GROUPS:
        closed = _close_groups(tl.reshape(ranked, (GROUPS_P, SIZE_P)), GROUPS, KEPT, BEST)
        ranked = tl.reshape(closed, (GROUPS_P * SIZE_P,))
    slots = tl.arange(0, SLOTS_P)
    chosen = tl.zeros((SLOTS_P,), tl.int32)
    w = tl.zeros((SLOTS_P,), tl.float32)
    for slot in tl.static_range(SLOTS):
        best = position == tl.argmax(ranked, axis=0)
        chosen = tl.where(slots == slot, tl.sum(tl.where(best, expert, 0), axis=0), chosen)
        w = tl.where(slots == slot, tl.sum(tl.where(best, score, 0.0), axis=0), w)
        ranked = tl.where(best, float("-inf"), ranked)
    if RENORMALISE:
        w /= tl.sum(w, axis=0) + epsilon
    w *= scaling
    if SCALED:
        w *= tl.load(expert_scale + chosen).to(tl.float32)
    tl.store(weights + token * SLOTS + slots, w, mask=slots < SLOTS)
    tl.store(experts + token * SLOTS + slots, chosen, mask=slots < SLOTS)


@jit
def _choose_backward(
    dw: tl.tensor,
    logits: tl.tensor,
    experts: tl.tensor,
    expert_scale: tl.tensor,
    dlogits: tl.tensor,
    logits_stride: int,
    count: int,
    scaling: float,
    epsilon: float,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < count
    z = tl.load(logits + token * logits_stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    score = _scores(z, SIGMOID)
    dscore = tl.zeros((BLOCK,), tl.float32)
    picked = expert < 0
    for slot in tl.static_range(SLOTS):
        chosen = tl.load(experts + token * SLOTS + slot)
        d = tl.load(dw + token * SLOTS + slot).to(tl.float32) * scaling
        if SCALED:
            d *= tl.load(expert_scale + chosen).to(tl.float32)
        dscore = tl.where(expert == chosen, d, dscore)
        picked = picked | (expert == chosen)
    if RENORMALISE:
        total = tl.sum(tl.where(picked, score, 0.0), axis=0) + epsilon
        dscore = tl.where(picked, (dscore - tl.sum(dscore * score, axis=0) / total) / total, 0.0)
    dz = dscore * score * (1.0 - score) if SIGMOID else score * (dscore - tl.sum(dscore * score, axis=0))
    tl.store(dlogits + token * count + expert, dz, mask=inside)


def choose(
    logits: Tensor, choice: Choice, *, bias: Tensor | None = None, expert_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_router.choose`."""
    if not runs_on_triton(logits):
        return reference.choose(logits, choice, bias=bias, expert_scale=expert_scale)
    tokens, size = logits.shape[0], choice.group_size(logits.shape[1])
    weights = torch.empty(tokens, choice.k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(tokens, choice.k, dtype=torch.int32, device=logits.device)
    _choose[(tokens,)](
        logits, logits if bias is None else bias, logits if expert_scale is None else expert_scale, weights, experts,
        logits.stride(0), choice.scaling, choice.epsilon,
        SIGMOID=choice.score == "sigmoid", RENORMALISE=choice.renormalise, BIASED=bias is not None,
        SCALED=expert_scale is not None, SLOTS=choice.k, SLOTS_P=pow2(choice.k),
        GROUPS=choice.groups, KEPT=choice.kept_groups, BEST=choice.group_best, SIZE=size,
        GROUPS_P=pow2(choice.groups), SIZE_P=pow2(size), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return weights, experts


def choose_backward(
    dw: Tensor, logits: Tensor, experts: Tensor, choice: Choice, *, expert_scale: Tensor | None = None
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_router.choose_backward`."""
    if not runs_on_triton(logits):
        return reference.choose_backward(dw, logits, experts, choice, expert_scale=expert_scale)
    tokens, count = logits.shape
    dlogits = logits.new_empty(tokens, count)
    _choose_backward[(tokens,)](
        dw.contiguous(), logits, experts, logits if expert_scale is None else expert_scale, dlogits,
        logits.stride(0), count, choice.scaling, choice.epsilon,
        SIGMOID=choice.score == "sigmoid", RENORMALISE=choice.renormalise, SCALED=expert_scale is not None,
        SLOTS=choice.k, BLOCK=pow2(count), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return dlogits
