"""FP8 products in plain torch: what :mod:`slimtune.engine.kernels.fp8` is held to.

A matrix is numbers of e4m3 (four bits of exponent, three of mantissa, no infinity) beside a float32 scale for each row.

Of some channels, C of the K that a product sums over, what rounding lost comes in as more of them. With r8 for what x8
and w8 lack, by the same scales, a row of x and one of the weight are

    [x8 | x8[channels] | rx8[channels]]          [w8 | rw8[channels] | w8[channels]]

so that these channels' part of the product is x8 · w8 + x8 · rw8 + rx8 · w8. What both lost, rx · rw, is 2⁻⁸ of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_nf4
from slimtune.engine.kernels.formats import NestedScales
from slimtune.engine.kernels.reference_experts import Routes, experts_of

__all__ = [
    "DRAWS",
    "E4M3",
    "LARGEST",
    "LEAST",
    "from_nf4",
    "grouped_product",
    "loss_and_grad_",
    "lost",
    "product",
    "quantize",
    "row_scales",
    "stack_from_nf4",
    "subtract_targets_",
]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
DRAWS = (2654435769, 1640531527, 0x9E379E37)
"""Steps, of 2³², of what decides whether a number of the head's gradient is rounded up: from column to column, from row
to row, from one bfloat16 of a target's logit to the next (there the lower half counts). All are golden, as a Weyl
sequence spreads most evenly by."""
LEAST = 1e-30
"""What a row's largest number counts as at least: a row of zeros has a scale too."""


def quantize(
    x: Tensor, *, factors: Tensor | None = None, again: Tensor | None = None, routes: Routes | None = None
) -> tuple[Tensor, Tensor]:
    """Each row by a scale of its own, so that its largest number becomes e4m3's: x · factors = e4m3 · scale.

    Args:
        x: [T, N] with any row stride.
        factors: float32 [N], what the columns are multiplied with first; with routes [E, N], each expert's own.
        again: int32 [C], the channels whose numbers, and then whose losses, come behind; with routes [E, C] as factors.
        routes: A row of the result for each of theirs, its token's; else one for each of x.

    Returns:
        e4m3 [T, N + 2 C], contiguous, and the scales, float32 [T, 1]. A number that is none stays none; beside an
        infinite one the whole row becomes none or zero by an infinite scale, so that its products are no numbers.
    """
    if routes is not None:
        x, own = x[routes.order // routes.place.shape[1]], experts_of(routes)
        factors, again = (None if each is None else each[own] for each in (factors, again))
    wide = x.float() if factors is None else x.float() * factors
    most = wide.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(1, keepdim=True).clamp(min=LEAST)
    scale = most * (1.0 / LARGEST)
    exact = (wide * (1.0 / scale)).clamp(-LARGEST, LARGEST)
    values = exact.to(E4M3)
    if again is None:
        return values, scale
    chosen = exact[:, again] if again.ndim == 1 else exact.gather(1, again.long())
    return torch.cat((exact, chosen, lost(chosen)), dim=1).to(E4M3), scale


def lost(exact: Tensor) -> Tensor:
    """What rounding to e4m3 takes away."""
    return exact - exact.to(E4M3).float()


def row_scales(absmax: Tensor, rows: int, *, nested: NestedScales | None = None) -> Tensor:
    """The scale of each row of an NF4 weight, float32 [rows]: its largest block's over e4m3's largest number.

    Args:
        absmax: Block scales, float32 or codes, as :func:`slimtune.engine.kernels.reference_nf4.dequantize` takes them;
            a row is a whole number of blocks.
        rows: Rows of the weight.
        nested: The scales' own quantisation.
    """
    blocks = reference_nf4.block_scales(absmax, nested)
    return blocks.view(rows, -1).abs().amax(1).clamp(min=LEAST) * (1.0 / LARGEST)


def from_nf4(
    packed: Tensor,
    absmax: Tensor,
    scales: Tensor,
    *,
    shape: tuple[int, int],
    nested: NestedScales | None = None,
    blocksize: int = 64,
    out: Tensor | None = None,
    turned: Tensor | None = None,
    again: Tensor | None = None,
) -> None:
    """An NF4 weight's rows in e4m3, each over its scale.

    Args:
        packed: As :func:`slimtune.engine.kernels.reference_nf4.dequantize` takes it.
        absmax: Likewise; a row is a whole number of blocks.
        scales: float32 [out_features], from :func:`row_scales`.
        shape: (out_features, in_features), multiples of 16.
        nested: The scales' own quantisation.
        blocksize: Weights that share a block scale.
        out: e4m3 [out_features, in_features + 2 C] to write into, contiguous rows: what the forward multiplies with.
        turned: e4m3 [in_features, out_features], the transpose, with any row stride: what the backward multiplies with.
        again: int32 [C], the channels whose losses, and then whose numbers, come behind in ``out``.
    """
    blocks = reference_nf4.block_scales(absmax, nested)
    over = (blocks.view(shape[0], -1) * (1.0 / scales)[:, None]).view(-1)
    exact = reference_nf4.dequantize(packed, over, shape=shape, dtype=torch.float32, blocksize=blocksize)
    exact = exact.clamp(-LARGEST, LARGEST)
    if turned is not None:
        turned.copy_(exact.t().to(E4M3))
    if out is not None:
        chosen = exact[:, :0] if again is None else exact[:, again]
        out.copy_(torch.cat((exact, lost(chosen), chosen), dim=1).to(E4M3))


def stack_from_nf4(
    packed: Tensor,
    absmax: Tensor,
    scales: Tensor,
    *,
    shape: tuple[int, int],
    nested: NestedScales | None = None,
    blocksize: int = 64,
    out: Tensor | None = None,
    turned: Tensor | None = None,
    again: Tensor | None = None,
) -> None:
    """A stack of NF4 weights, each as :func:`from_nf4` writes it.

    Args:
        packed: As :func:`slimtune.engine.kernels.reference_nf4.dequantize_stack` takes it.
        absmax: Likewise; a row is a whole number of blocks.
        scales: float32 [stack, out_features].
        shape: Of one matrix.
        nested: As there.
        blocksize: Weights that share a block scale.
        out: e4m3 [stack, out_features, in_features + 2 C] to write into.
        turned: e4m3 [stack, in_features, out_features], the transposes.
        again: int32 [stack, C].
    """
    for index, (codes, levels) in enumerate(zip(packed, absmax, strict=True)):
        own = nested and NestedScales(nested.absmax[index], nested.code, nested.offset[index], nested.blocksize)
        written, across, chosen = (None if each is None else each[index] for each in (out, turned, again))
        from_nf4(
            codes, levels, scales[index], shape=shape, nested=own, blocksize=blocksize, out=written, turned=across,
            again=chosen,
        )  # fmt: skip


def product(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    out: Tensor | None = None,
    long_sum: bool = False,
) -> Tensor:
    """bfloat16 [T, N]: x · weightᵀ times x's scales and the weight's, summed in float32.

    Args:
        x: e4m3 [T, K].
        x_scales: float32 [T, 1].
        weight: e4m3 [N, K].
        scales: float32 [N].
        out: bfloat16 [T, N] to write into.
        long_sum: K is so large that the tensor cores' own sums, of about 13 bits, are too coarse: they are added up
            outside of them.
    """
    y = (x.float() @ weight.float().t()) * x_scales * scales
    return y.bfloat16() if out is None else out.copy_(y)


def grouped_product(x: Tensor, x_scales: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """bfloat16 [R, N]: each row times its expert's matrix, as :func:`product`.

    Args:
        x: e4m3 [R, K], sorted by expert.
        x_scales: float32 [R, 1].
        weights: e4m3 [E, N, K].
        scales: float32 [E, N].
        ends: int32 [E], the row after each expert's last; the last of them is R.
    """
    y = torch.empty(x.shape[0], weights.shape[1], dtype=torch.bfloat16, device=x.device)
    first = 0
    for expert, end in enumerate(ends.tolist()):
        product(x[first:end], x_scales[first:end], weights[expert], scales[expert], out=y[first:end])
        first = end
    return y


def loss_and_grad_(
    logits: Tensor, targets: Tensor, vocabulary: int, *, again: int = 0, before: int = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy: overwrite logits with their gradient but for the targets' own part, give the loss's sum.

    The gradient, softmax - onehot(target), is rows · scales - onehot(target) · own, on average: each number is rounded
    to one of its two neighbours in e4m3, to the one as often as it is near it, by a Weyl sequence over columns and
    rows that begins by the target's logit.

    Args:
        logits: [N, K] with any row stride, in 16 bits or more; the vocabulary's come first.
        targets: int64 [N]; -100 where there is none.
        vocabulary: V, at most K.
        again: C, at most K: of so many columns, the first, the numbers come once more behind each row.
        before: Rows of the same micro-batch before these, so that a chunk is rounded as it is in the whole.
        softcap: The loss is that of softcap x tanh(logits / softcap).

    Returns:
        Sum over rows of -log softmax(logits)[target], float32 scalar. The rows, e4m3 [N, K + C] where the logits were,
        of the row stride that this makes: zero in the target's column, and behind the vocabulary. float32 [N, 1], the
        rows' scales. float32 [N, 1], own. All are zero in the rows without a target.
    """
    known, index = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    bent = None if softcap is None else torch.tanh(logits[:, :vocabulary].float() / softcap)
    z = logits[:, :vocabulary].float() if bent is None or softcap is None else bent * softcap
    chosen, beside = z.gather(1, index), z.scatter(1, index, -torch.inf)
    begins = logits.gather(1, index).float().view(torch.int32).long() * DRAWS[2]
    peak = beside.amax(1, keepdim=True)
    most = torch.maximum(peak, chosen)
    others = (beside - most).exp().sum(1, keepdim=True)
    whole = others + (chosen - most).exp()
    exact, own = (beside - peak).exp() * LARGEST, others / whole
    if bent is not None:
        exact, own = exact * (1 - bent * bent), own * (1 - bent.gather(1, index).square())
    width = logits.shape[1]
    rows = logits.view(E4M3)[:, : width + again]
    rows.zero_()
    rows[:, :vocabulary] = _rounded_on_average(torch.where(known, exact, 0.0), begins, before)
    rows[:, width:] = rows[:, :again]
    scales, losses = (peak - most).exp() / whole * (1.0 / LARGEST), whole.log() + (most - chosen)
    loss, scales, own = (torch.where(known, each, 0.0) for each in (losses, scales, own))
    return loss.sum(), rows, scales, own


def _rounded_on_average(x: Tensor, begins: Tensor, before: int) -> Tensor:
    """x, float32 [N, V] of 0 to 448, in e4m3: up as often as it is near the upper neighbour; begins: int64 [N, 1].

    e4m3 has three of float32's 23 bits of mantissa, and steps of 2⁻⁹ below 2⁻⁶, float32's steps with these three bits
    from there to 2⁻⁵.
    """
    rows, columns = (torch.arange(count, device=x.device) for count in x.shape)
    draw = (((columns * DRAWS[0] + (rows[:, None] + before) * DRAWS[1] + begins) & 0xFFFFFFFF) >> 12).int()
    shift = torch.where(x < 2.0**-6, 2.0**-6, 0.0)
    bits = ((x + shift).view(torch.int32) + draw) & -0x100000
    return (bits.view(torch.float32) - shift).to(E4M3)


def subtract_targets_(y: Tensor, head: Tensor, targets: Tensor, own: Tensor, scales: Tensor, again: int) -> None:
    """y -= own · the head's rows of the targets, as a product has them whose second side is the head in e4m3.

    Args:
        y: [N, H].
        head: [V, H].
        targets: int64 [N]; -100 where there is none.
        own: float32 [N, 1].
        scales: float32 [H], of the head's columns.
        again: Rows of the head, the first, that the product has with what rounding lost of them: all but exact.
    """
    known = targets >= 0
    exact = head.index_select(0, targets.clamp(min=0)).float()
    rounded = (exact * (1.0 / scales)).clamp(-LARGEST, LARGEST).to(E4M3).float() * scales
    taken = torch.where((targets < again)[:, None], exact, rounded) * own
    y.copy_(torch.where(known[:, None], y - taken, y))
