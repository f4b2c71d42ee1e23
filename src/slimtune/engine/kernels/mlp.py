"""The gated MLP's elementwise part.

Forward: h = act(gate) · up with act(g) = g · σ(v(g)): v = g is silu (SwiGLU), v = √(8/π) (g + 0.044715 g³) is GELU in
its tanh form (GeGLU); or act(g) = σ(g), a gate. Backward, with a = act(gate) and s = σ(v(gate)): dup = w · dh · a and
dgate = w · dh · up · a', where a' = s + a · (1 - s) · v', or of a gate s · (1 - s); they overwrite gate and up, which
nobody needs afterwards, and h is given back for who recomputes it.
w is 1, or in a mixture of experts the router's weight of the row, whose gradient is Σ dh · h over the row. Clamped,
as gpt-oss has it: with g = min(gate, L) and u = clamp(up, -L, L), h = g · σ(α g) · (u + 1), and no gradient where a
clamp holds, nor at its edge, as in today's PyTorch.

Layout: [T, F] with any row stride: gate and up may be the halves of one [T, 2 F] product or alternate in it, h the
first columns of a wider buffer. A program takes a block of a row's columns, or the whole row where the weight's
gradient is summed up.
Source: Shazeer 2020 (arXiv:2002.05202), as Transformers' ``LlamaMLP`` and ``GemmaMLP`` have it; GELU by Hendrycks and
Gimpel 2016 (arXiv:1606.08415), whose (1 + tanh(v / 2)) / 2 is σ(v); clamped: ``GptOssExperts``.

Dtype traps: Transformers rounds act(gate) before it multiplies by up; here the product is rounded once.
"""

from __future__ import annotations

from torch import Tensor

from slimtune.engine.kernels import reference_mlp as reference
from slimtune.engine.kernels._triton import cdiv, jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.reference_experts import Routes
from slimtune.engine.kernels.reference_mlp import Activation, Clamped

__all__ = ["Activation", "Clamped", "activate", "factor", "gated_backward_", "gated_forward", "numbers"]


@jit
def activate(g: tl.tensor, alpha: float, limit: float, KIND: tl.constexpr) -> tl.tensor:
    """The activation of g and its slope."""
    if KIND == "clamped":
        inside = g < limit
        g = tl.where(g > limit, limit, g)  # what is no number stays none
        sigma = tl.sigmoid(alpha * g)
        act = g * sigma
        slope = tl.where(inside, sigma + alpha * act * (1.0 - sigma), g * 0.0)
    elif KIND == "sigmoid":
        act = tl.sigmoid(g)
        slope = act * (1.0 - act)
    elif KIND == "gelu_tanh":
        sigma = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        act = g * sigma
        slope = sigma + act * (1.0 - sigma) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        sigma = tl.sigmoid(g)
        act = g * sigma
        slope = sigma + act * (1.0 - sigma)
    return act, slope


@jit
def factor(u: tl.tensor, limit: float, KIND: tl.constexpr) -> tl.tensor:
    """What of u multiplies the activation, and whether u has a gradient."""
    inside = u == u
    if KIND == "clamped":
        inside = tl.abs(u) < limit
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + 1.0
    return u, inside


@jit
def _load(
    gate: tl.tensor, up: tl.tensor, start: int, size: int, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """BLOCK gates and ups of a row from column ``start`` on."""
    if INTERLEAVED:
        pair = 2 * start + tl.arange(0, 2 * BLOCK)
        both = tl.load(gate + pair, mask=pair < 2 * size, other=0.0)
        g, u = tl.split(tl.reshape(both, (BLOCK, 2)))
    else:
        columns = start + tl.arange(0, BLOCK)
        g = tl.load(gate + columns, mask=columns < size, other=0.0)
        u = tl.load(up + columns, mask=columns < size, other=0.0)
    return g.to(tl.float32), u.to(tl.float32)


@jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    h: tl.tensor,
    gate_stride: int,
    up_stride: int,
    h_stride: int,
    size: int,
    alpha: float,
    limit: float,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    gate += tl.multiple_of(row * gate_stride, ALIGN)
    up += tl.multiple_of(row * up_stride, ALIGN)
    g, u = _load(gate, up, start, size, INTERLEAVED, BLOCK)
    act, _ = activate(g, alpha, limit, KIND)
    u, _ = factor(u, limit, KIND)
    columns = start + tl.arange(0, BLOCK)
    tl.store(h + tl.multiple_of(row * h_stride, ALIGN) + columns, act * u, mask=columns < size)


@jit
def _backward(
    dh: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    h: tl.tensor,
    order: tl.tensor,
    weights: tl.tensor,
    dw: tl.tensor,
    dh_stride: int,
    gate_stride: int,
    up_stride: int,
    h_stride: int,
    size: int,
    alpha: float,
    limit: float,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WITH_H: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_DW: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    dh += tl.multiple_of(row * dh_stride, ALIGN)
    gate += tl.multiple_of(row * gate_stride, ALIGN)
    up += tl.multiple_of(row * up_stride, ALIGN)
    h += tl.multiple_of(row * h_stride, ALIGN)
    if WEIGHTED:
        w = tl.load(weights + tl.load(order + row)).to(tl.float32)
    if WITH_DW:
        total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, SPAN, BLOCK):
        start = tl.program_id(1) * SPAN + offset
        columns = start + tl.arange(0, BLOCK)
        mask = columns < size
        d = tl.load(dh + columns, mask=mask, other=0.0).to(tl.float32)
        g, u = _load(gate, up, start, size, INTERLEAVED, BLOCK)
        act, slope = activate(g, alpha, limit, KIND)
        u, inside = factor(u, limit, KIND)
        if WITH_DW:
            total += d * (act * u)
        if WEIGHTED:
            d *= w
        dgate = d * u * slope
        dup = tl.where(inside, d * act, u * 0.0)
        if INTERLEAVED:
            pair = 2 * start + tl.arange(0, 2 * BLOCK)
            tl.store(gate + pair, tl.reshape(tl.join(dgate, dup), (2 * BLOCK,)), mask=pair < 2 * size)
        else:
            tl.store(gate + columns, dgate, mask=mask)
            tl.store(up + columns, dup, mask=mask)
        if WITH_H:
            tl.store(h + columns, act * u, mask=mask)
    if WITH_DW:
        tl.store(dw + tl.load(order + row), tl.sum(total, axis=0))


def _block(size: int) -> int:
    """Columns at a time: with 512 to a warp 16 elements to a thread, two 16-byte loads of each operand in flight."""
    return min(max(pow2(size), 512), 2048)


def numbers(activation: Activation) -> tuple[float, float, str]:
    """Alpha, limit and the kind, as the kernels take them."""
    if isinstance(activation, Clamped):
        return activation.alpha, activation.limit, "clamped"
    return 0.0, 0.0, activation


def _alternate(gate: Tensor, up: Tensor) -> bool:
    """Whether each gate is followed by its up."""
    beside = up.data_ptr() - gate.data_ptr() == gate.element_size()
    return gate.stride(1) == 2 and gate.stride() == up.stride() and beside


def gated_forward(gate: Tensor, up: Tensor, *, activation: Activation = "silu", out: Tensor | None = None) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_mlp.gated_forward`."""
    if not runs_on_triton(gate):
        return reference.gated_forward(gate, up, activation=activation, out=out)
    rows, size = gate.shape
    h = gate.new_empty(rows, size) if out is None else out
    block = _block(size)
    alpha, limit, kind = numbers(activation)
    _forward[(rows, cdiv(size, block))](
        gate, up, h, gate.stride(0), up.stride(0), h.stride(0), size, alpha, limit,
        KIND=kind, INTERLEAVED=_alternate(gate, up), BLOCK=block, ALIGN=row_alignment(gate, up, h),
        num_warps=block // 512, enable_fp_fusion=True,
    )  # fmt: skip
    return h


def gated_backward_(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation = "silu",
    h: Tensor | None = None,
    routes: Routes | None = None,
    weights: Tensor | None = None,
    dw: Tensor | None = None,
) -> None:
    """See :func:`slimtune.engine.kernels.reference_mlp.gated_backward_`."""
    if not runs_on_triton(gate) or (routes is None and not (weights is None and dw is None)):
        reference.gated_backward_(
            dh, gate, up, activation=activation, h=h, routes=routes, weights=weights, dw=dw
        )  # fmt: skip
        return
    rows, size = gate.shape
    place = dh if h is None else h
    block = _block(size)
    alpha, limit, kind = numbers(activation)
    span = block if dw is None else cdiv(size, block) * block
    _backward[(rows, cdiv(size, span))](
        dh, gate, up, place, dh if routes is None else routes.order,
        dh if weights is None else weights.contiguous(), dh if dw is None else dw,
        dh.stride(0), gate.stride(0), up.stride(0), place.stride(0), size, alpha, limit,
        KIND=kind, INTERLEAVED=_alternate(gate, up),
        WITH_H=h is not None, WEIGHTED=weights is not None, WITH_DW=dw is not None,
        SPAN=span, BLOCK=block, ALIGN=row_alignment(dh, gate, up, h), num_warps=block // 512, enable_fp_fusion=True,
    )  # fmt: skip
