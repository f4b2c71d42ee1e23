"""bitsandbytes' blockwise 8-bit AdamW over all parameters in one launch.

A block of 256 elements: decode m = map1[code1] · absmax1 and v = map2[code2] · absmax2; m = β1 m + (1 - β1) g;
v = β2 v + (1 - β2) g²; p = p (1 - lr · decay) - lr / (1 - β1ᵗ) · m / (sqrt(v) / sqrt(1 - β2ᵗ) + eps); encode m and v
by their new absmax. Blocks of tensors under 4,096 elements keep m and v in float32. Scalars that change from step to
step (lr, t, the clipping factor, whether to skip) are read from the device, so a captured graph follows them.

Layout: ``formats.aligned_offsets`` and ``formats.AdamWState``. One program takes four blocks.

Source: Dettmers et al. 2021 (arXiv:2110.02861); bitsandbytes 0.50, ``csrc/ops.cu`` and ``backends/cpu/ops.py``, whose
implementations differ in small things. Here codes are the nearest (as on CUDA; the CPU's table search misses it for
a few in a thousand), a negative m never becomes zero (CUDA), decay comes before the update (CPU, torch's ``AdamW``).

Dtype traps: 1 - βᵗ is computed in float64; in float32 1 - 0.999 alone would cost four digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimtune.engine.kernels import reference
from slimtune.engine.kernels._triton import cdiv, jit, runs_on_triton, tl
from slimtune.engine.kernels.formats import BLOCK, ZERO_CODE, AdamWState, aligned_offsets

__all__ = ["AdamWState", "adamw_step_", "aligned_offsets"]


@jit
def _encode(values: tl.tensor, code: tl.tensor) -> tl.tensor:
    """Indices of the nearest values in the ascending code, by binary search; and each row's absmax."""
    absmax = tl.max(tl.abs(values), axis=1)
    scaled = values * (1.0 / tl.maximum(absmax, 1e-38))[:, None]
    index = tl.zeros_like(values).to(tl.int32)
    for level in tl.static_range(8):
        half = 128 >> level
        edge = (tl.load(code + index + half - 1) + tl.load(code + index + half)) * 0.5
        index += tl.where(scaled > edge, half, 0)
    return tl.where((absmax > 0.0)[:, None], index, 0), absmax


@jit
def _step(
    weights: tl.tensor,
    grads: tl.tensor,
    codes1: tl.tensor,
    codes2: tl.tensor,
    absmax1: tl.tensor,
    absmax2: tl.tensor,
    map1: tl.tensor,
    map2: tl.tensor,
    small: tl.tensor,
    exact1: tl.tensor,
    exact2: tl.tensor,
    lr: tl.tensor,
    step: tl.tensor,
    grad_scale: tl.tensor,
    skip: tl.tensor,
    blocks: int,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    DECAY: tl.constexpr,
    SCALE: tl.constexpr,
    SKIP: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    if SKIP:  # noqa: SIM102 (the outer condition is a constant of the compilation, the inner a value)
        if tl.load(skip).to(tl.int32) != 0:
            return
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, SIZE)[None, :]
    inside = block < blocks
    row = tl.load(small + block, mask=inside, other=-1)
    coded = inside & (row < 0)
    element = (block.to(tl.int64) * SIZE)[:, None] + lane
    place = (row.to(tl.int64) * SIZE)[:, None] + lane
    every, encoded, exact = inside[:, None], coded[:, None], (row >= 0)[:, None]

    g = tl.load(grads + element, mask=every, other=0.0)
    p = tl.load(weights + element, mask=every, other=0.0)
    index1 = tl.load(codes1 + element, mask=encoded, other=0).to(tl.int32)
    index2 = tl.load(codes2 + element, mask=encoded, other=0).to(tl.int32)
    m = tl.load(map1 + index1) * tl.load(absmax1 + block, mask=coded, other=0.0)[:, None]
    v = tl.load(map2 + index2) * tl.load(absmax2 + block, mask=coded, other=0.0)[:, None]
    m += tl.load(exact1 + place, mask=exact, other=0.0)
    v += tl.load(exact2 + place, mask=exact, other=0.0)
    rate = tl.load(lr)
    t = tl.load(step).to(tl.float64)
    correction1 = (1.0 - tl.exp(t * LOG_BETA1)).to(tl.float32)
    correction2 = tl.sqrt(1.0 - tl.exp(t * LOG_BETA2)).to(tl.float32)
    if SCALE:
        g *= tl.load(grad_scale)
    if DECAY > 0.0:
        p *= 1.0 - rate * DECAY

    m = m * BETA1 + (1.0 - BETA1) * g
    v = v * BETA2 + (1.0 - BETA2) * g * g
    tl.store(weights + element, p - rate / correction1 * (m / (tl.sqrt_rn(v) / correction2 + EPS)), mask=every)
    tl.store(exact1 + place, m, mask=exact)
    tl.store(exact2 + place, v, mask=exact)
    index1, peak1 = _encode(m, map1)
    index1 = tl.where((index1 == ZERO) & (m < 0.0), ZERO - 1, index1)
    tl.store(codes1 + element, index1.to(tl.uint8), mask=encoded)
    tl.store(absmax1 + block, peak1, mask=coded)
    index2, peak2 = _encode(v, map2)
    tl.store(codes2 + element, index2.to(tl.uint8), mask=encoded)
    tl.store(absmax2 + block, peak2, mask=coded)


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
    """See :func:`slimtune.engine.kernels.reference.adamw_step_`."""
    if not runs_on_triton(params):
        reference.adamw_step_(
            params, grads, state, lr=lr, step=step, betas=betas, eps=eps, weight_decay=weight_decay,
            grad_scale=grad_scale, skip=skip,
        )  # fmt: skip
        return
    blocks, rows = params.numel() // BLOCK, 4
    _step[(cdiv(blocks, rows),)](
        params, grads, state.codes1, state.codes2, state.absmax1, state.absmax2, state.map1, state.map2, state.small,
        state.exact1, state.exact2, lr, step, lr if grad_scale is None else grad_scale,
        lr if skip is None else skip.view(torch.uint8), blocks,
        BETA1=betas[0], BETA2=betas[1], LOG_BETA1=math.log(betas[0]), LOG_BETA2=math.log(betas[1]), EPS=eps,
        DECAY=weight_decay, SCALE=grad_scale is not None, SKIP=skip is not None, ZERO=ZERO_CODE,
        ROWS=rows, SIZE=BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
