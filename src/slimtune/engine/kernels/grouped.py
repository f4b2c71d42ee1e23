"""Products of rows with their experts' matrices: each expert its own slice of rows, whose ends lie on the device.

Forward: y[r] = W[e] x[r] for the rows r of expert e. Backward: dx[r] = W[e]ᵀ dy[r]; the matrices are frozen.

Layout: rows [R, K] sorted by expert, any row stride; W [E, N, K] with any row and matrix stride, so that an expert's
adapter may stand in further columns of its matrix, or each matrix turned: its columns contiguous. The one's forward is
the other's backward. Which kernel computes it is a matter of the device (decision 85):
torch's grouped product, which is CUTLASS', where it asks the host nothing, else this one. A program takes a tile of an
expert's rows and some columns; which expert's, it counts itself from the ends. As the host doesn't know how many tiles
there are, it launches as many as there can be.

Source: MegaBlocks (Gale et al. 2022, arXiv:2211.15841), section 5.1; ``torch.nn.functional.grouped_mm``.

Dtype traps: products accumulate in float32 and are rounded once; float32 is multiplied in float32, not TF32. torch's
grouped product takes float16 and float32 too, and devices before and after sm_90 and sm_100, but then reads the ends on
the host, which stalls and can't be recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_experts as reference
from slimtune.engine.kernels._triton import cdiv, jit, pow2, row_alignment, runs_on_triton, tl

__all__ = ["grouped_backward", "grouped_forward", "most_tiles", "tile_of"]


@jit
def tile_of(ends: tl.tensor, tile: int, COUNT: tl.constexpr, COUNT_P: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """A tile's expert, its first row and the row after the expert's last; COUNT for a tile that there isn't.

    Tiles have BLOCK rows of one expert each, the last of an expert fewer. Those of expert e, whose rows begin at s,
    have the numbers from s // BLOCK + e on. The next expert's begin where these have ended, or further on, however many
    rows there are: no number is given twice, and none is rows // BLOCK + COUNT or more. It needs no sum over experts.
    """
    every = tl.arange(0, COUNT_P)
    inside = every < COUNT
    end = tl.load(ends + every, mask=inside, other=0)
    start = tl.load(ends + every - 1, mask=inside & (every > 0), other=0)
    nth = tile - start // BLOCK - every
    own = inside & (nth >= 0) & (start + nth * BLOCK < end)
    expert = COUNT - tl.sum(tl.where(own, COUNT - every, 0), axis=0)
    return expert, tl.sum(tl.where(own, start + nth * BLOCK, 0), axis=0), tl.sum(tl.where(own, end, 0), axis=0)


def most_tiles(rows: int, count: int, block: int) -> int:
    """How many tiles there may be, the gaps in their numbers included."""
    return rows // block + count


@jit
def _product(
    rows: tl.tensor,
    weights: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    size: int,
    columns: int,
    rows_stride: int,
    matrix_stride: int,
    weights_stride: int,
    out_stride: int,
    BACKWARD: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    expert, first, end = tile_of(ends, tl.program_id(1), COUNT, COUNT_P, BLOCK_T)
    if expert < COUNT:
        row = first + tl.arange(0, BLOCK_T)
        inside = (row < end)[:, None]
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        source = rows + tl.multiple_of(row.to(tl.int64) * rows_stride, ALIGN)[:, None]
        matrix = weights + tl.multiple_of(expert.to(tl.int64) * matrix_stride, ALIGN)
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, size, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(source + k[None, :], mask=inside & (k < size)[None, :], other=0.0)
            if BACKWARD:
                place = matrix + tl.multiple_of(k * weights_stride, ALIGN)[:, None] + column[None, :]
            else:
                place = matrix + tl.multiple_of(column * weights_stride, ALIGN)[None, :] + k[:, None]
            w = tl.load(place, mask=(k < size)[:, None] & (column < columns)[None, :], other=0.0)
            total = tl.dot(x, w, total, input_precision=PRECISION)
        target = out + tl.multiple_of(row.to(tl.int64) * out_stride, ALIGN)[:, None] + column[None, :]
        tl.store(target, total, mask=inside & (column < columns)[None, :])


def _torch_waits(rows: Tensor, weights: Tensor) -> bool:
    """Whether torch's grouped product would read the ends on the host, or refuse these operands.

    By torch 2.11's and 2.15's ``aten/src/ATen/native/cuda/GroupedBlas.cpp`` and ``GroupMM.cu``: CUTLASS for bfloat16 on
    sm_90 and sm_100, up to 1,023 matrices, everything starting at multiples of 16 bytes.
    """
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or weights.dtype != torch.bfloat16:
        return True
    if torch.cuda.get_device_capability(rows.device)[0] not in (9, 10) or weights.shape[0] > 1023:
        return True
    starts = (rows.data_ptr() // 2, weights.data_ptr() // 2, rows.stride(0), *weights.stride()[:2])
    return any(start % 8 for start in starts)


def _is_turned(weights: Tensor) -> bool:
    return weights.stride(2) != 1 and weights.stride(1) == 1


def grouped_forward(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_experts.grouped_forward`."""
    if not runs_on_triton(rows):
        return reference.grouped_forward(rows, weights, ends)
    if _is_turned(weights):
        return grouped_backward(rows, weights.transpose(1, 2), ends)
    if not _torch_waits(rows, weights):
        return torch.nn.functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    return _launch(rows, weights, ends, weights.shape[1], backward=False)


def grouped_backward(dy: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_experts.grouped_backward`."""
    if not runs_on_triton(dy):
        return reference.grouped_backward(dy, weights, ends)
    if _is_turned(weights):
        return grouped_forward(dy, weights.transpose(1, 2), ends)
    if not _torch_waits(dy, weights):
        return torch.nn.functional.grouped_mm(dy, weights, offs=ends)
    return _launch(dy, weights, ends, weights.shape[2], backward=True)


def _launch(rows: Tensor, weights: Tensor, ends: Tensor, columns: int, *, backward: bool) -> Tensor:
    (total, size), count = rows.shape, weights.shape[0]
    out = rows.new_empty(total, columns)
    wide = rows.dtype == torch.float32
    # A tile of as many rows as an expert has on average, so that few of a tile's are empty.
    block_t = min(max(pow2(cdiv(total, count)), 16), 64 if wide else 128)
    block_n = 64 if wide else 128
    _product[(cdiv(columns, block_n), most_tiles(total, count, block_t))](
        rows, weights, ends, out, size, columns,
        rows.stride(0), weights.stride(0), weights.stride(1), out.stride(0),
        BACKWARD=backward, COUNT=count, COUNT_P=pow2(count), BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=32,
        ALIGN=row_alignment(rows, weights, out), PRECISION="ieee" if wide else "tf32",
        num_warps=8 if block_t == 128 else 4, num_stages=2 if wide else 4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
