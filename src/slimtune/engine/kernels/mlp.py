"""The gated MLP's elementwise part.

Forward: h = silu(gate) · up, with silu(g) = g · σ(g).
Backward: dgate = dh · up · (σ + silu · (1 - σ)), dup = dh · silu; they overwrite gate and up, which nobody needs
afterwards, and h is given back for who recomputes it.

Layout: [T, F] with any row stride: gate and up may be the halves of one [T, 2 F] product, h the first columns of a
wider buffer. Source: Shazeer 2020 (arXiv:2002.05202), as Transformers' ``LlamaMLP`` has it.

Dtype traps: Transformers rounds silu(gate) before it multiplies by up; here the product is rounded once.
"""

from __future__ import annotations

from torch import Tensor

from slimtune.engine.kernels import reference
from slimtune.engine.kernels._triton import cdiv, jit, row_alignment, runs_on_triton, tl

__all__ = ["swiglu_backward_", "swiglu_forward"]

_BLOCK = 2048  # with 4 warps 16 elements to a thread: two 16-byte loads of each operand in flight


@jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    h: tl.tensor,
    gate_stride: int,
    up_stride: int,
    h_stride: int,
    size: int,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    g = tl.load(gate + tl.multiple_of(row * gate_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + tl.multiple_of(row * up_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + tl.multiple_of(row * h_stride, ALIGN) + columns, g * tl.sigmoid(g) * u, mask=mask)


@jit
def _backward(
    dh: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    h: tl.tensor,
    dh_stride: int,
    gate_stride: int,
    up_stride: int,
    h_stride: int,
    size: int,
    WITH_H: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate += tl.multiple_of(row * gate_stride, ALIGN)
    up += tl.multiple_of(row * up_stride, ALIGN)
    d = tl.load(dh + tl.multiple_of(row * dh_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + columns, mask=mask, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    silu = g * sigma
    tl.store(gate + columns, d * u * (sigma + silu * (1.0 - sigma)), mask=mask)
    tl.store(up + columns, d * silu, mask=mask)
    if WITH_H:
        tl.store(h + tl.multiple_of(row * h_stride, ALIGN) + columns, silu * u, mask=mask)


def swiglu_forward(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference.swiglu_forward`."""
    if not runs_on_triton(gate):
        return reference.swiglu_forward(gate, up, out=out)
    rows, size = gate.shape
    h = gate.new_empty(rows, size) if out is None else out
    _forward[(rows, cdiv(size, _BLOCK))](
        gate, up, h, gate.stride(0), up.stride(0), h.stride(0), size,
        BLOCK=_BLOCK, ALIGN=row_alignment(gate, up, h), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return h


def swiglu_backward_(dh: Tensor, gate: Tensor, up: Tensor, *, h: Tensor | None = None) -> None:
    """See :func:`slimtune.engine.kernels.reference.swiglu_backward_`."""
    if not runs_on_triton(gate):
        reference.swiglu_backward_(dh, gate, up, h=h)
        return
    rows, size = gate.shape
    place = dh if h is None else h
    _backward[(rows, cdiv(size, _BLOCK))](
        dh, gate, up, place, dh.stride(0), gate.stride(0), up.stride(0), place.stride(0), size,
        WITH_H=h is not None, BLOCK=_BLOCK, ALIGN=row_alignment(dh, gate, up, h), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
