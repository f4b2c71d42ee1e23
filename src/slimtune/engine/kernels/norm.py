"""RMS norm and LayerNorm, with the residual's addition in the same pass.

Forward, a row x of H elements: s = x + residual; rstd = 1 / sqrt(mean(s²) + eps); y = s · rstd · weight.
Backward for a frozen weight, with g = dy · weight and ŝ = s · rstd: ds = rstd · (g - ŝ · mean(g · ŝ)) + dresidual.
Centred, as LayerNorm is: s - mean(s) stands for s above, and g - mean(g) for g in the backward.

Layout: [T, H] with any row stride. One program takes one row, which stays in registers, so that memory is passed
over once. Source: Zhang and Sennrich 2019 (arXiv:1910.07467), as Transformers' ``LlamaRMSNorm`` has it; Ba et al. 2016
(arXiv:1607.06450), as its ``CohereLayerNorm``.

Dtype traps: s is rounded to x's dtype *before* it is normalised, because that is what the backward will read again;
Transformers rounds s · rstd before it multiplies by the weight, here the product is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference
from slimtune.engine.kernels._triton import jit, pow2, row_alignment, runs_on_triton, tl

__all__ = ["norm_backward", "norm_forward"]


@jit
def _forward(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    rstd: tl.tensor,
    x_stride: int,
    residual_stride: int,
    y_stride: int,
    total_stride: int,
    size: int,
    eps: float,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    s = tl.load(x + tl.multiple_of(row * x_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(residual + tl.multiple_of(row * residual_stride, ALIGN) + columns, mask=mask, other=0.0)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + tl.multiple_of(row * total_stride, ALIGN) + columns, rounded, mask=mask)
        s = rounded.to(tl.float32)
    if CENTRED:
        s = tl.where(mask, s - tl.sum(s, axis=0) / size, 0.0)
    r = 1.0 / tl.sqrt_rn(tl.sum(s * s, axis=0) / size + eps)
    tl.store(rstd + row, r)
    tl.store(y + tl.multiple_of(row * y_stride, ALIGN) + columns, s * r * w, mask=mask)


@jit
def _backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    dresidual: tl.tensor,
    dx: tl.tensor,
    dy_stride: int,
    x_stride: int,
    dresidual_stride: int,
    dx_stride: int,
    size: int,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    g = tl.load(dy + tl.multiple_of(row * dy_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
    xhat = tl.load(x + tl.multiple_of(row * x_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    if ADD:
        path = tl.load(dresidual + tl.multiple_of(row * dresidual_stride, ALIGN) + columns, mask=mask, other=0.0)
    g *= w
    if CENTRED:
        g = tl.where(mask, g - tl.sum(g, axis=0) / size, 0.0)
        xhat = tl.where(mask, xhat - tl.sum(xhat, axis=0) / size, 0.0)
    xhat *= r
    d = (g - xhat * (tl.sum(g * xhat, axis=0) / size)) * r
    if ADD:
        d += path.to(tl.float32)
    tl.store(dx + tl.multiple_of(row * dx_stride, ALIGN) + columns, d, mask=mask)


def _num_warps(block: int) -> int:
    """16 elements to a thread: two 16-byte loads of each operand in flight."""
    return min(max(block // 512, 1), 16)


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
    """See :func:`slimtune.engine.kernels.reference.norm_forward`."""
    if not runs_on_triton(x):
        return reference.norm_forward(x, weight, eps, residual=residual, centred=centred, out=out, out_sum=out_sum)
    rows, size = x.shape
    y = x.new_empty(rows, size) if out is None else out
    total = x if residual is None else x.new_empty(rows, size) if out_sum is None else out_sum
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = pow2(size)
    _forward[(rows,)](
        x, x if residual is None else residual, weight, y, total, rstd,
        x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0), total.stride(0), size, eps,
        ADD=residual is not None, CENTRED=centred, BLOCK=block, ALIGN=row_alignment(x, residual, y, total),
        num_warps=_num_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return y, total, rstd


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
    """See :func:`slimtune.engine.kernels.reference.norm_backward`."""
    if not runs_on_triton(x):
        return reference.norm_backward(dy, x, weight, rstd, dresidual=dresidual, centred=centred, out=out)
    rows, size = x.shape
    dx = dy.new_empty(rows, size) if out is None else out
    block = pow2(size)
    _backward[(rows,)](
        dy, x, weight, rstd, dy if dresidual is None else dresidual, dx,
        dy.stride(0), x.stride(0), 0 if dresidual is None else dresidual.stride(0), dx.stride(0), size,
        ADD=dresidual is not None, CENTRED=centred, BLOCK=block, ALIGN=row_alignment(dy, x, dresidual, dx),
        num_warps=_num_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return dx
