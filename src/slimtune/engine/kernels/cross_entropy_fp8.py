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

Each number is rounded to the e4m3 above or below it, up as often as it is near the upper one: what rounding to the
nearest leaves of a sum over many tokens is felt in a training (decision 175). What decides is a Weyl sequence, which is
spread evenly over columns and rows: its upper bits are added to those of float32 that e4m3 hasn't. Of the first columns
the numbers come once more behind the row, for what rounding lost of the head there; they lie in the first block, and
wait in registers.

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
from slimtune.engine.kernels.fp8 import nearest
from slimtune.engine.kernels.reference_fp8 import DRAWS, E4M3, LARGEST

__all__ = ["loss_and_grad_", "subtract_targets_"]

_LARGEST, _NORMAL = constant(LARGEST), constant(2.0**-6)
_COLUMN, _ROW, _TARGET = map(constant, DRAWS)


@jit
def _eighths_of(
    logits: tl.tensor,
    start: int,
    offset: tl.tensor,
    peak: tl.tensor,
    softcap: float,
    size: int,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """A block of a row's gradient in e4m3."""
    columns = start + tl.arange(0, BLOCK)
    z = tl.load(logits + columns, mask=columns < size, other=float("-inf"), eviction_policy="evict_first")
    z = z.to(tl.float32)
    slope = 1.0
    if CAP:
        curve = bent(z, softcap)
        z = tl.where(z != float("-inf"), curve * softcap, z)
        slope = 1.0 - curve * curve
    grad = tl.exp(z - peak) * slope
    # Below e4m3's normal numbers its steps are those that it has from the least of them.
    shift = tl.where(grad < _NORMAL / _LARGEST, _NORMAL, 0.0)
    draw = columns.to(tl.uint32) * _COLUMN + offset
    bits = (grad * _LARGEST + shift).to(tl.int32, bitcast=True) + (draw >> 12).to(tl.int32)
    return ((bits & -0x100000).to(tl.float32, bitcast=True) - shift).to(tl.float8e4nv)


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
    again: int,
    before: int,
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
        for start in range(0, width + again, BLOCK):
            zeros = tl.zeros((BLOCK,), tl.float32).to(tl.float8e4nv)
            tl.store(eighths + start + lane, zeros, mask=start + lane < width + again)
        tl.store(losses + row, 0.0)
        tl.store(scales + row, 0.0)
        tl.store(own + row, 0.0)
        return
    chosen = tl.load(logits + target).to(tl.float32)
    offset = (row + before).to(tl.uint32) * _ROW + chosen.to(tl.uint32, bitcast=True) * _TARGET
    slope = 1.0
    if CAP:
        chosen = bent(chosen, softcap)
        slope -= chosen * chosen
        chosen *= softcap
    # The target's own logit is in no sum from here on: read by all threads first, seen by all after.
    tl.debug_barrier()
    tl.store(logits + target, float("-inf"))
    tl.debug_barrier()
    peak = float("-inf")
    total = 0.0
    for start in range(0, size, BLOCK):
        peak, total = grown(peak, total, block_of(logits, start + lane, size, softcap, CAP))
    most = tl.maximum(peak, chosen)
    shrunk = tl.exp(peak - most)
    others = total * shrunk
    whole = others + tl.exp(chosen - most)
    tl.store(losses + row, tl.log(whole) + (most - chosen))
    tl.store(scales + row, shrunk / whole * (1.0 / _LARGEST))
    tl.store(own + row, others / whole * slope)
    first = _eighths_of(logits, 0, offset, peak, softcap, size, CAP, BLOCK)
    tl.debug_barrier()
    tl.store(eighths + lane, first, mask=lane < width)
    for start in range(BLOCK, width, BLOCK):
        block = _eighths_of(logits, start, offset, peak, softcap, size, CAP, BLOCK)
        tl.debug_barrier()
        tl.store(eighths + start + lane, block, mask=start + lane < width, eviction_policy="evict_first")
    tl.store(eighths + width + lane, first, mask=lane < again)


def loss_and_grad_(
    logits: Tensor, targets: Tensor, vocabulary: int, *, again: int = 0, before: int = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_fp8.loss_and_grad_`; ``again`` is at most 8,192."""
    if not runs_on_triton(logits):
        return reference.loss_and_grad_(logits, targets, vocabulary, again=again, before=before, softcap=softcap)
    rows, width = logits.shape
    eighths = logits.view(E4M3)[:, : width + again]
    # Each by itself: cuBLAS wants scales to begin at a multiple of 16 bytes.
    losses, scales, own = (torch.empty(rows, 1, dtype=torch.float32, device=logits.device) for _ in range(3))
    block = min(pow2(width), 8192)
    _loss_and_grad[(rows,)](
        logits, targets, eighths, losses, scales, own, softcap or 0.0, logits.stride(0), eighths.stride(0), vocabulary,
        width, again, before, CAP=softcap is not None, BLOCK=block, ALIGN=row_alignment(logits),
        num_warps=min(max(block // 1024, 1), 8), enable_fp_fusion=True,
    )  # fmt: skip
    return losses.sum(), eighths, scales, own


@jit
def _subtract_targets(
    y: tl.tensor,
    head: tl.tensor,
    targets: tl.tensor,
    own: tl.tensor,
    scales: tl.tensor,
    again: int,
    stride: int,
    head_stride: int,
    size: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target < 0:
        return
    share = tl.load(own + row)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        exact = tl.load(head + target * head_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + columns, mask=inside, other=1.0)
        rounded = nearest(tl.clamp(exact * tl.div_rn(1.0, scale), -_LARGEST, _LARGEST)) * scale
        taken = tl.where(target < again, exact, rounded)
        there = tl.load(y + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * stride + columns, there - share * taken, mask=inside)


def subtract_targets_(y: Tensor, head: Tensor, targets: Tensor, own: Tensor, scales: Tensor, again: int) -> None:
    """See :func:`slimtune.engine.kernels.reference_fp8.subtract_targets_`."""
    if not runs_on_triton(y):
        reference.subtract_targets_(y, head, targets, own, scales, again)
        return
    rows, size = y.shape
    block = min(pow2(size), 1024)
    _subtract_targets[(rows,)](
        y, head, targets, own, scales, again, y.stride(0), head.stride(0), size, BLOCK=block,
        num_warps=min(max(block // 256, 1), 4), enable_fp_fusion=True,
    )  # fmt: skip
