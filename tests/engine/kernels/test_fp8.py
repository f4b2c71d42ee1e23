"""FP8 operands: e4m3's own rounding of what NF4 and activations hold, and products that stay within it."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import fp8, nf4, reference_fp8, routing
from slimtune.engine.kernels.reference_experts import experts_of
from tests.engine.kernels.maker import Maker

SHAPES = [(144, 576), (16, 64)]
EPS = 2.0**-4
"""Half of e4m3's last place, over the number."""


def quantised(make: Maker, shape: tuple[int, int], *, double: bool) -> tuple[dict[str, object], Tensor]:
    """A weight whose rows and blocks differ in scale, as the kernel takes it, and in float32."""
    weight = make(*shape) * 10.0 ** make(shape[0], 1, dtype=torch.float32).to(make.dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double)
    nested = state.state2 and nf4.NestedScales(state.state2.absmax, state.state2.code, state.offset)
    arguments = {"packed": packed, "absmax": state.absmax, "nested": nested}
    return arguments, nf4.dequantize(**arguments, shape=shape, dtype=torch.float32)


def written(arguments: dict[str, object], scales: Tensor, shape: tuple[int, int], *names: str) -> dict[str, Tensor]:
    """Both layouts, or one."""
    device = scales.device
    places = {"out": torch.empty(shape, device=device), "turned": torch.empty(shape[::-1], device=device)}
    places = {name: places[name].fill_(7.0).to(fp8.E4M3) for name in names}
    fp8.from_nf4(**arguments, scales=scales, shape=shape, **places)
    return {name: place.float() for name, place in places.items()}


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_rounded_once_and_its_transpose_is_the_same(
    make: Maker, shape: tuple[int, int], double: bool
) -> None:
    arguments, weight = quantised(make, shape, double=double)
    scales = fp8.row_scales(arguments["absmax"], shape[0], nested=arguments["nested"])
    assert torch.allclose(weight.abs().amax(1), scales * 448, rtol=1e-6)
    both = written(arguments, scales, shape, "out", "turned")
    assert torch.equal(both["out"], both["turned"].t())
    for name, alone in (("out", both["out"]), ("turned", both["turned"])):
        assert torch.equal(written(arguments, scales, shape, name)[name], alone)
    apart = (both["out"] * scales[:, None] - weight).abs()
    assert (apart <= EPS * weight.abs() + scales[:, None] * 2.0**-10 * 1.001).all()
    assert torch.equal(both["out"].abs().amax(1), torch.full_like(scales, 448.0))


@pytest.mark.parametrize("size", [64, 576, 1088])
def test_a_row_is_rounded_by_its_own_scale(make: Maker, size: int) -> None:
    x = make.strided_copy(make(9, size) * 10.0 ** make(9, 1, dtype=torch.float32).to(make.dtype).clamp(-2, 2))
    factors = make(size, dtype=torch.float32).abs() + 0.1
    for by in (None, factors):
        want = x.float() if by is None else x.float() * by
        x8, scales = fp8.quantize(x, factors=by)
        assert torch.equal(x8.float().abs().amax(1), torch.full((9,), 448.0, device=x.device))
        assert torch.allclose(want.abs().amax(1, keepdim=True), scales * 448, rtol=1e-6)
        assert ((x8.float() * scales - want).abs() <= (EPS * want.abs() + scales * 2.0**-10) * 1.001).all()


def test_a_row_of_zeros_is_one_and_what_is_no_number_stays_none(make: Maker) -> None:
    x = make(4, 64)
    x[0], x[1, 3], x[2, 5] = 0.0, float("nan"), float("inf")
    x8, scales = fp8.quantize(x)
    assert not x8[0].float().any()
    assert torch.isfinite(scales[0]).all()
    assert torch.isnan(x8[1, 3].float())
    assert torch.isfinite(x8[1].float()).sum() == 63
    weight = torch.ones(16, 64, device=x.device).to(fp8.E4M3)
    y = fp8.product(x8, scales, weight, torch.ones(16, device=x.device))
    assert not y[0].any()
    assert torch.isnan(y[1:3]).all()
    assert torch.isfinite(y[3]).all()


def test_forward_and_backward_multiply_with_the_same_numbers(make: Maker) -> None:
    shape = (144, 576)
    arguments, _ = quantised(make, shape, double=True)
    scales = fp8.row_scales(arguments["absmax"], shape[0], nested=arguments["nested"])
    places = {"out": torch.empty(shape, dtype=fp8.E4M3, device=scales.device)}
    places["turned"] = torch.empty(shape[::-1], dtype=fp8.E4M3, device=scales.device)
    fp8.from_nf4(**arguments, scales=scales, shape=shape, **places)
    weight = places["out"].double() * scales.double()[:, None]
    x, dy = make(32, 576), make(32, 144)
    for given, operand, own, want in (
        (fp8.quantize(x), places["out"], scales, x.double() @ weight.t()),
        (fp8.quantize(dy, factors=scales), places["turned"], torch.ones(576, device=dy.device), dy.double() @ weight),
    ):
        y = fp8.product(*given, operand, own).double()
        # Each factor of a sum is off by up to 1/16 at random: 2.6 % of what the sum's terms add up to in squares.
        assert (y - want).square().mean().sqrt() < 0.03 * want.square().mean().sqrt()


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_what_rounding_lost_comes_behind(make: Maker, double: bool) -> None:
    """Of some channels the product has what both factors lost, up to what is lost twice."""
    shape, count = (144, 576), 40
    arguments, weight = quantised(make, shape, double=double)
    x = make(9, 576)
    again = torch.randperm(576, generator=make.generator)[:count].int().to(x.device)
    scales = fp8.row_scales(arguments["absmax"], shape[0], nested=arguments["nested"])
    place = torch.empty(shape[0], shape[1] + 2 * count, device=x.device).fill_(7.0).to(fp8.E4M3)
    fp8.from_nf4(**arguments, scales=scales, shape=shape, out=place, again=again)
    x8, x_scales = fp8.quantize(x, again=again)
    exact, wide = (x.float() / x_scales).double(), x8.double()
    weight, own = (weight / scales[:, None]).double(), place.double()
    assert torch.equal(x8[:, :576].float(), fp8.quantize(x)[0].float())
    assert torch.equal(place[:, :576].float(), written(arguments, scales, shape, "out")["out"])
    assert torch.equal(wide[:, 576:][:, :count], wide[:, again])
    assert torch.equal(own[:, 576:][:, count:], own[:, again])
    least = 2.0**-10 * 1.001
    lost = exact[:, again] - wide[:, again]
    assert ((wide[:, 576 + count :] - lost).abs() <= EPS * lost.abs() + least).all()
    lost = weight[:, again] - own[:, again]
    assert ((own[:, 576:][:, :count] - lost).abs() <= EPS * lost.abs() + least).all()
    more = wide @ own.t() - wide[:, :576] @ own[:, :576].t()
    kept = (
        wide[:, again] @ (weight - own[:, :576])[:, again].t() + (exact - wide[:, :576])[:, again] @ own[:, again].t()
    )
    assert (more - kept).square().mean().sqrt() < 0.03 * kept.square().mean().sqrt()
    y = fp8.product(x8, x_scales, place, scales).double()
    want = (wide @ own.t()) * x_scales.double() * scales.double()
    assert (y - want).square().mean().sqrt() < 0.003 * want.square().mean().sqrt()


def routed(make: Maker, tokens: int, count: int, k: int = 2) -> routing.Routes:
    """Some experts get no token."""
    experts = torch.randint(0, count - 1, (tokens, k), generator=make.generator).to(make.device)
    return routing.sort_by_expert(experts, count)


def test_rows_of_experts_are_their_tokens_by_the_experts_factors(make: Maker) -> None:
    x, routes = make.strided_copy(make(9, 160)), routed(make, 9, 5)
    rows, own = x[(routes.order // 2).long()], experts_of(routes)
    again = torch.randint(0, 160, (5, 3), generator=make.generator, dtype=torch.int32).to(x.device)
    factors = make(5, 160, dtype=torch.float32).abs() + 0.1
    for found, want in (
        (fp8.quantize(x, routes=routes, again=again), reference_fp8.quantize(rows, again=again[own])),
        (fp8.quantize(x, routes=routes, factors=factors), fp8.quantize(rows.float() * factors[own])),
    ):
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, want, strict=True))
    assert torch.equal(own, torch.repeat_interleave(torch.arange(5, device=x.device), counts(routes)))


def counts(routes: routing.Routes) -> Tensor:
    """Rows of each expert."""
    return torch.diff(routes.ends, prepend=routes.ends.new_zeros(1))


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_a_stack_is_its_matrices(make: Maker, double: bool) -> None:
    """Blocks of scales that no scale of scales covers whole, and means of their own."""
    shape, each = (48, 192), []
    for scale in (1.0, 0.01, 30.0):
        arguments, _ = quantised(make, shape, double=double)
        arguments["absmax"] = arguments["absmax"].clone()
        each.append(arguments if double else {**arguments, "absmax": arguments["absmax"] * scale})
    packed = torch.stack([one["packed"].view(-1) for one in each])
    absmax, nested = torch.stack([one["absmax"] for one in each]), None
    if double:
        parts = [one["nested"] for one in each]
        nested = nf4.NestedScales(
            torch.stack([one.absmax for one in parts]), parts[0].code, torch.stack([one.offset for one in parts])
        )
    scales = torch.stack([fp8.row_scales(one["absmax"], shape[0], nested=one["nested"]) for one in each])
    again = torch.randint(0, shape[1], (3, 3), generator=make.generator, dtype=torch.int32).to(packed.device)
    wide, across = (3, shape[0], shape[1] + 6), (3, *shape[::-1])
    made = {"out": torch.empty(wide, dtype=fp8.E4M3, device=packed.device)}
    made["turned"] = torch.empty(across, dtype=fp8.E4M3, device=packed.device)
    fp8.stack_from_nf4(packed, absmax, scales, shape=shape, nested=nested, again=again, **made)
    for index, one in enumerate(each):
        own = {name: torch.empty_like(place[index]) for name, place in made.items()}
        fp8.from_nf4(**one, scales=scales[index], shape=shape, again=again[index], **own)
        assert all(torch.equal(own[name].float(), made[name][index].float()) for name in own)


def test_a_grouped_product_is_each_experts(make: Maker) -> None:
    routes = routed(make, 40, 5)
    x8, scales = fp8.quantize(make(40, 64), routes=routes)
    weights, own = make(5, 48, 64, dtype=torch.float32), make(5, 48, dtype=torch.float32).abs()
    weights = weights.to(fp8.E4M3)
    y = fp8.grouped_product(x8, scales, weights, own, routes.ends)
    expert = experts_of(routes)
    want = torch.einsum("rk,rnk->rn", x8.double(), weights.double()[expert]) * scales * own[expert]
    assert (y - want).square().mean().sqrt() < 0.003 * want.square().mean().sqrt()
