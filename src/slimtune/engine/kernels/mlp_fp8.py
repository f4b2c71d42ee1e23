"""The gated MLP's elementwise part whose results go straight into FP8.

The same numbers as :mod:`slimtune.engine.kernels.mlp` followed by :func:`slimtune.engine.kernels.fp8.quantize`, rounded
between them as those are; but what is only multiplied in FP8 is never written in 16 bits, and nothing is read back.

Layout: a program takes a row, and passes over it twice: for its largest number, and to write. The second time the row
comes from the cache, so that a row of any length is read once from memory and needs few registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import fp8, mlp
from slimtune.engine.kernels._triton import jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.fp8 import E4M3, lost, row_scale
from slimtune.engine.kernels.mlp import Activation, activate, factor, numbers
from slimtune.engine.kernels.reference_experts import Routes, experts_of

__all__ = ["experts_backward", "gated_backward", "gated_forward"]


@jit
def _hidden(
    gate: tl.tensor, up: tl.tensor, columns: tl.tensor, size: int, alpha: float, limit: float, KIND: tl.constexpr
) -> tl.tensor:  # fmt: skip
    g = tl.load(gate + columns, mask=columns < size, other=0.0)
    u = tl.load(up + columns, mask=columns < size, other=0.0).to(tl.float32)
    act, _ = activate(g.to(tl.float32), alpha, limit, KIND)
    u, _ = factor(u, limit, KIND)
    return tl.where(columns < size, act * u, 0.0).to(g.dtype)


@jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    h: tl.tensor,
    again: tl.tensor,
    order: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    gate_stride: int,
    up_stride: int,
    h_stride: int,
    size: int,
    count: int,
    alpha: float,
    limit: float,
    KIND: tl.constexpr,
    WITH_H: tl.constexpr,
    ROUTED: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAIN: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    gate += tl.multiple_of(row * gate_stride, ALIGN)
    up += tl.multiple_of(row * up_stride, ALIGN)
    h += tl.multiple_of(row * h_stride, ALIGN)
    lanes = tl.arange(0, BLOCK)
    value = _hidden(gate, up, lanes, size, alpha, limit, KIND)
    most = tl.abs(value.to(tl.float32))
    for start in range(BLOCK, size if SEVERAL else BLOCK, BLOCK):
        other = _hidden(gate, up, start + lanes, size, alpha, limit, KIND)
        most = tl.maximum(most, tl.abs(other.to(tl.float32)))
    scale = row_scale(tl.max(most, axis=0))
    tl.store(scales + row, scale)
    inverse = tl.div_rn(1.0, scale)
    out += row * (size + 2 * count)
    for start in range(0, size if SEVERAL else BLOCK, BLOCK):
        if SEVERAL:
            value = _hidden(gate, up, start + lanes, size, alpha, limit, KIND)
        mask = start + lanes < size
        if WITH_H:
            tl.store(h + start + lanes, value, mask=mask)
        tl.store(out + start + lanes, (value.to(tl.float32) * inverse).to(tl.float8e4nv), mask=mask)
    if AGAIN > 0:
        if ROUTED:
            again += tl.load(experts + tl.load(order + row)).to(tl.int64) * count
        each = tl.arange(0, AGAIN)
        mask = each < count
        channel = tl.load(again + each, mask=mask, other=0)
        value = _hidden(gate, up, channel, size, alpha, limit, KIND).to(tl.float32) * inverse
        tl.store(out + size + each, value.to(tl.float8e4nv), mask=mask)
        tl.store(out + size + count + each, lost(value), mask=mask)


@jit
def _gradients(
    dh: tl.tensor, gate: tl.tensor, up: tl.tensor, w: tl.tensor, start: int, size: int, alpha: float, limit: float,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Of gates and ups, rounded, and dh · h."""
    columns = start + tl.arange(0, BLOCK)
    mask = columns < size
    g = tl.load(gate + columns, mask=mask, other=0.0)
    u = tl.load(up + columns, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dh + columns, mask=mask, other=0.0).to(tl.float32)
    act, slope = activate(g.to(tl.float32), alpha, limit, KIND)
    u, inside = factor(u, limit, KIND)
    dot = d * (act * u)
    d *= w
    dgate, dup = d * u * slope, tl.where(inside, d * act, 0.0)
    return tl.where(mask, dgate, 0.0).to(g.dtype), tl.where(mask, dup, 0.0).to(g.dtype), dot


@jit
def _by_factors(dgate: tl.tensor, dup: tl.tensor, factors: tl.tensor, columns: tl.tensor, size: int) -> tl.tensor:
    mask = columns < size
    first = dgate.to(tl.float32) * tl.load(factors + columns, mask=mask, other=0.0)
    return first, dup.to(tl.float32) * tl.load(factors + size + columns, mask=mask, other=0.0)


@jit
def _backward(
    dh: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    factors: tl.tensor,
    order: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    dw: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    dh_stride: int,
    gate_stride: int,
    up_stride: int,
    size: int,
    alpha: float,
    limit: float,
    KIND: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROUTED: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    dh += tl.multiple_of(row * dh_stride, ALIGN)
    gate += tl.multiple_of(row * gate_stride, ALIGN)
    up += tl.multiple_of(row * up_stride, ALIGN)
    out += row * 2 * size
    lanes = tl.arange(0, BLOCK)
    w = 1.0
    if ROUTED:
        pair = tl.load(order + row)
        factors += tl.load(experts + pair).to(tl.int64) * 2 * size
        w = tl.load(weights + pair).to(tl.float32)
    dgate, dup, total = _gradients(dh, gate, up, w, 0, size, alpha, limit, KIND, BLOCK)
    first, second = _by_factors(dgate, dup, factors, lanes, size)
    most = tl.maximum(tl.abs(first), tl.abs(second))
    for start in range(BLOCK, size if SEVERAL else BLOCK, BLOCK):
        others, ups, dot = _gradients(dh, gate, up, w, start, size, alpha, limit, KIND, BLOCK)
        others, ups = _by_factors(others, ups, factors, start + lanes, size)
        total += dot
        most = tl.maximum(most, tl.maximum(tl.abs(others), tl.abs(ups)))
    scale = row_scale(tl.max(most, axis=0))
    tl.store(scales + row, scale)
    inverse = tl.div_rn(1.0, scale)
    if ROUTED:
        tl.store(dw + pair, tl.sum(total, axis=0))
    for start in range(0, size if SEVERAL else BLOCK, BLOCK):
        columns = start + lanes
        mask = columns < size
        if SEVERAL:
            dgate, dup, _ = _gradients(dh, gate, up, w, start, size, alpha, limit, KIND, BLOCK)
            first, second = _by_factors(dgate, dup, factors, columns, size)
        if IN_PLACE:
            tl.store(gate + columns, dgate, mask=mask)
            tl.store(up + columns, dup, mask=mask)
        tl.store(out + columns, (first * inverse).to(tl.float8e4nv), mask=mask)
        tl.store(out + size + columns, (second * inverse).to(tl.float8e4nv), mask=mask)


def gated_forward(
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation = "silu",
    out: Tensor | None = None,
    again: Tensor | None = None,
    routes: Routes | None = None,
) -> tuple[Tensor, Tensor]:
    """h = act(gate) x up in e4m3 [T, F + 2 C], and its rows' scales, float32 [T, 1].

    Args:
        gate: [T, F] with any row stride.
        up: Likewise.
        activation: As :func:`slimtune.engine.kernels.mlp.gated_forward` takes it.
        out: [T, F] that takes h in gate's dtype too, with any row stride.
        again: As :func:`slimtune.engine.kernels.fp8.quantize` takes it; with routes [E, C], each expert's.
        routes: The rows' of a mixture.
    """
    if not runs_on_triton(gate):
        by = again if again is None or routes is None else again[experts_of(routes)]
        return fp8.quantize(mlp.gated_forward(gate, up, activation=activation, out=out), again=by)
    (rows, size), count = gate.shape, 0 if again is None else again.shape[-1]
    values = torch.empty(rows, size + 2 * count, dtype=E4M3, device=gate.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=gate.device)
    alpha, limit, kind = numbers(activation)
    block = _block(size)
    _forward[(rows,)](
        gate, up, gate if out is None else out, gate if again is None else again,
        gate if routes is None else routes.order, gate if routes is None else routes.experts, values, scales,
        gate.stride(0),
        up.stride(0), 0 if out is None else out.stride(0), size, count, alpha, limit, KIND=kind,
        WITH_H=out is not None, ROUTED=routes is not None, SEVERAL=size > block, BLOCK=block,
        AGAIN=pow2(count) if count else 0,
        ALIGN=row_alignment(gate, up, out), num_warps=block // 512, enable_fp_fusion=True,
    )  # fmt: skip
    return values, scales


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, factors: Tensor, *, activation: Activation = "silu", in_place: bool
) -> tuple[Tensor, Tensor]:
    """[dgate | dup] · factors in e4m3 [T, 2 F], and its rows' scales, float32 [T, 1].

    Args:
        dh: The gradient of h, [T, F] with any row stride.
        gate: Likewise.
        up: Likewise.
        factors: float32 [2 F], what the columns are multiplied with.
        activation: As :func:`slimtune.engine.kernels.mlp.gated_backward_` takes it.
        in_place: Overwrite gate and up with their gradients, without factors, too.
    """
    if not runs_on_triton(gate):
        gate, up = (gate, up) if in_place else (gate.clone(), up.clone())
        mlp.gated_backward_(dh, gate, up, activation=activation)
        return fp8.quantize(torch.cat((gate, up), dim=1), factors=factors)
    return _launch_backward(dh, gate, up, factors, activation, in_place=in_place)


def experts_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    factors: Tensor,
    *,
    activation: Activation,
    routes: Routes,
    weights: Tensor,
    dw: Tensor,
) -> tuple[Tensor, Tensor]:
    """As :func:`gated_backward` for a mixture's rows, each weighed by its router's weight.

    Args:
        dh: The gradient of h without the rows' weights, [R, F] with any row stride.
        gate: Likewise; it stays as it is.
        up: Likewise.
        factors: float32 [E, 2 F], each expert's.
        activation: As there.
        routes: The rows'.
        weights: As :func:`slimtune.engine.kernels.mlp.gated_backward_` takes them.
        dw: Likewise.
    """
    if not runs_on_triton(gate):
        gate, up = gate.clone(), up.clone()
        mlp.gated_backward_(dh, gate, up, activation=activation, routes=routes, weights=weights, dw=dw)
        return fp8.quantize(torch.cat((gate, up), dim=1) * factors[experts_of(routes)])
    return _launch_backward(dh, gate, up, factors, activation, in_place=False, mixture=(routes, weights, dw))


def _launch_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    factors: Tensor,
    activation: Activation,
    *,
    in_place: bool,
    mixture: tuple[Routes, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    rows, size = gate.shape
    values = torch.empty(rows, 2 * size, dtype=E4M3, device=gate.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=gate.device)
    order = experts = weights = dw = scales
    if mixture is not None:
        routes, weights, dw = mixture
        order, experts = routes.order, routes.experts
    alpha, limit, kind = numbers(activation)
    block = _block(size)
    _backward[(rows,)](
        dh, gate, up, factors, order, experts, weights.contiguous(), dw, values, scales, dh.stride(0), gate.stride(0),
        up.stride(0), size, alpha, limit, KIND=kind, IN_PLACE=in_place, ROUTED=mixture is not None,
        SEVERAL=size > block, BLOCK=block, ALIGN=row_alignment(dh, gate, up), num_warps=block // 512,
        enable_fp_fusion=True,
    )  # fmt: skip
    return values, scales


def _block(size: int) -> int:
    """Columns at a time: 16 to a thread."""
    return min(max(pow2(size), 512), 2048)
