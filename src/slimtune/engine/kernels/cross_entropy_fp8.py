"""Cross-entropy of a chunk of logits, with the gradient as rows of e4m3 in the logits' own memory.

For a row z with target t the gradient is softmax(z) - onehot(t). All but the target's term is rows of e4m3 times a
scale each, as a product in FP8 takes them: 448 exp(z_j - peak), peak the largest logit beside the target's. The
target's own, p_t - 1, would be most of what a row's scale is made of: it stays outside, and is summed up as the others'
share, which loses no digits where p_t is near 1. With a soft cap the gradient gets its slope, as in
:mod:`slimtune.engine.kernels.cross_entropy`.

Layout: one program takes one row in two passes, as there; of seven blocks and numbers of warps 8,192 by eight were the
fastest on an H200 (``benchmarks/results/2026-11-30-fp8-head-h200.json``), several rows to a multiprocessor. The second
pass reads a block of 16-bit logits and writes its e4m3 to the front of the same row, so that nothing is taken beside
the logits: block i of the one lies before block i of the other, but for the first, and a barrier stands between what
all threads read of a block and what they write.

The far tail, what is below e4m3's least number, is rounded up as often as it is large: of a vocabulary it is some
hundredths of all probability, which nothing would push down any more. What it is compared with are a Weyl sequence's
parts of one, spread evenly over columns and rows.

Dtype traps: nothing is read back that was stored in e4m3. A product of these rows sums over a whole vocabulary, which
the tensor cores' own sums of about 13 bits are too coarse for: on an H200 it is 0.08 to 0.16 of the gradient's size
off with fast accumulation, and 0.002 to 0.004 without (``long_sum`` of :func:`slimtune.engine.kernels.fp8.product`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_fp8 as reference
from slimtune.engine.kernels._triton import constant, jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.cross_entropy import bent, block_of, grown
from slimtune.engine.kernels.reference_fp8 import E4M3, LARGEST, STEP

__all__ = ["loss_and_grad_"]

_LARGEST, _STEP, _STEPS = constant(LARGEST), constant(STEP), constant(1.0 / STEP)


@jit
def _loss_and_grad(
    logits: tl.tensor,
    targets: tl.tensor,
    eighths: tl.tensor,
    losses: tl.tensor,
    scales: tl.tensor,
    own: tl.tensor,
    softcap: float,
    stride: int,
    eighths_stride: int,
    size: int,
    width: int,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int32)
    logits += tl.multiple_of(row * stride, ALIGN)
    eighths += row * eighths_stride  # a multiple of 16
    lane = tl.arange(0, BLOCK)
    if target < 0:
        for start in range(0, width, BLOCK):
            zeros = tl.zeros((BLOCK,), tl.float32).to(tl.float8e4nv)
            tl.store(eighths + start + lane, zeros, mask=start + lane < width)
        tl.store(losses + row, 0.0)
        tl.store(scales + row, 0.0)
        tl.store(own + row, 0.0)
        return
    chosen = tl.load(logits + target).to(tl.float32)
    slope = 1.0
    if CAP:
        chosen = bent(chosen, softcap)
        slope -= chosen * chosen
        chosen *= softcap
    peak = float("-inf")
    total = 0.0
    for start in range(0, size, BLOCK):
        columns = start + lane
        z = block_of(logits, columns, size, softcap, CAP)
        peak, total = grown(peak, total, tl.where(columns == target, float("-inf"), z))
    most = tl.maximum(peak, chosen)
    shrunk = tl.exp(peak - most)
    others = total * shrunk
    whole = others + tl.exp(chosen - most)
    tl.store(losses + row, tl.log(whole) + (most - chosen))
    tl.store(scales + row, shrunk / whole * (1.0 / _LARGEST))
    tl.store(own + row, others / whole * slope)
    for start in range(0, width, BLOCK):
        columns = start + lane
        z = tl.load(logits + columns, mask=columns < size, other=float("-inf"), eviction_policy="evict_first")
        z = z.to(tl.float32)
        factor = _LARGEST
        if CAP:
            curve = bent(z, softcap)
            z = tl.where(columns < size, curve * softcap, float("-inf"))
            factor = (1.0 - curve * curve) * _LARGEST
        grad = tl.where(columns == target, 0.0, tl.exp(z - peak) * factor)
        draw = (columns.to(tl.uint32) * 2654435769 + row.to(tl.uint32) * 1640531527) >> 8
        least = tl.where(grad * _STEPS > draw.to(tl.float32) * (1.0 / 16777216.0), _STEP, 0.0)
        grad = tl.where(grad < _STEP, least, grad)
        tl.debug_barrier()
        tl.store(eighths + columns, grad.to(tl.float8e4nv), mask=columns < width, eviction_policy="evict_first")


def loss_and_grad_(
    logits: Tensor, targets: Tensor, vocabulary: int, *, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_fp8.loss_and_grad_`."""
    if not runs_on_triton(logits):
        return reference.loss_and_grad_(logits, targets, vocabulary, softcap=softcap)
    rows, width = logits.shape
    eighths = logits.view(E4M3)[:, :width]
    # Each by itself: cuBLAS wants scales to begin at a multiple of 16 bytes.
    losses, scales, own = (torch.empty(rows, 1, dtype=torch.float32, device=logits.device) for _ in range(3))
    block = min(pow2(width), 8192)
    _loss_and_grad[(rows,)](
        logits, targets, eighths, losses, scales, own, softcap or 0.0, logits.stride(0), eighths.stride(0), vocabulary,
        width, CAP=softcap is not None, BLOCK=block, ALIGN=row_alignment(logits),
        num_warps=min(max(block // 1024, 1), 8), enable_fp_fusion=True,
    )  # fmt: skip
    return losses.sum(), eighths, scales, own
