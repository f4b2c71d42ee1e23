"""Cross-entropy of a chunk of logits: the loss, and the gradient in the logits' place.

Forward, a row z with target t: loss = logsumexp(z) - z[t]. Backward: dz = (softmax(z) - onehot(t)) · scale. A row
without a target (-100) adds nothing and becomes zero, so that a chunk of fixed size can hold fewer tokens. With a soft
cap c (Gemma 2) the loss is that of c · tanh(z / c), and dz gets the factor 1 - tanh²(z / c).

Layout: [N, V] with any row stride; the vocabulary may be any length (32,000 to 262,144 in practice). One program
takes one row in two passes: running maximum and sum of exponentials (Milakov and Gimelshein 2018, arXiv:1805.02867),
then the gradient. 32 warps to a program leave room for one row a multiprocessor, and the first pass asks the L2 cache
to keep what it reads, so that the second finds it there.

Dtype traps: 16-bit logits are widened first; the gradient is rounded once. A row's start needs 64-bit arithmetic:
16,384 rows of 151,936 are past 2³¹.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference
from slimtune.engine.kernels._triton import jit, pow2, row_alignment, runs_on_triton, tl

__all__ = ["loss_and_grad_"]


@jit
def bent(z: tl.tensor, softcap: float) -> tl.tensor:
    """tanh(z / softcap); e^x may end in infinity or zero, and is right with either."""
    return 1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0)


@jit
def block_of(logits: tl.tensor, columns: tl.tensor, size: int, softcap: float, CAP: tl.constexpr) -> tl.tensor:
    """A block of a row's logits in float32, for the first of two passes; -inf behind the vocabulary."""
    z = tl.load(logits + columns, mask=columns < size, other=float("-inf"), eviction_policy="evict_last")
    z = z.to(tl.float32)
    if CAP:
        z = tl.where(z != float("-inf"), bent(z, softcap) * softcap, z)
    return z


@jit
def grown(peak: tl.tensor, total: tl.tensor, z: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The running maximum, and the sum of exponentials less it, with a block more."""
    higher = tl.maximum(peak, tl.max(z, axis=0))
    return higher, total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), axis=0)


@jit
def _loss_and_grad(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    scale: tl.tensor,
    scale_value: float,
    softcap: float,
    stride: int,
    size: int,
    CAP: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += tl.multiple_of(row * stride, ALIGN)
    lane = tl.arange(0, BLOCK)
    if target < 0:
        for start in range(0, size, BLOCK):
            tl.store(logits + start + lane, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + lane < size)
        tl.store(losses + row, 0.0)
        return
    chosen = tl.load(logits + target).to(tl.float32)
    if CAP:
        chosen = bent(chosen, softcap) * softcap
    peak = float("-inf")
    total = 0.0
    for start in range(0, size, BLOCK):
        peak, total = grown(peak, total, block_of(logits, start + lane, size, softcap, CAP))
    tl.store(losses + row, tl.log(total) + (peak - chosen))
    factor = scale_value
    if SCALE_ON_DEVICE:
        factor = tl.load(scale).to(tl.float32)
    inverse = factor / total
    for start in range(0, size, BLOCK):
        columns = start + lane
        z = tl.load(logits + columns, mask=columns < size, other=float("-inf"), eviction_policy="evict_first")
        z = z.to(tl.float32)
        slope = 1.0
        if CAP:
            curve = bent(z, softcap)
            z = curve * softcap
            slope = 1.0 - curve * curve
        grad = (tl.exp(z - peak) * inverse - tl.where(columns == target, factor, 0.0)) * slope
        tl.store(logits + columns, grad, mask=columns < size, eviction_policy="evict_first")


def loss_and_grad_(logits: Tensor, targets: Tensor, scale: Tensor | float, *, softcap: float | None = None) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference.loss_and_grad_`."""
    if not runs_on_triton(logits):
        return reference.loss_and_grad_(logits, targets, scale, softcap=softcap)
    rows, size = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    on_device = isinstance(scale, Tensor)
    block = min(pow2(size), 16384)
    _loss_and_grad[(rows,)](
        logits, targets, losses, scale if on_device else losses, 0.0 if on_device else float(scale),
        softcap or 0.0, logits.stride(0), size,
        CAP=softcap is not None, SCALE_ON_DEVICE=on_device, BLOCK=block, ALIGN=row_alignment(logits),
        num_warps=min(max(block // 512, 1), 32), enable_fp_fusion=True,
    )  # fmt: skip
    return losses.sum()
