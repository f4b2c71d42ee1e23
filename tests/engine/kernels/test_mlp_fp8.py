"""The gated MLP's results in FP8 are what is made in 16 bits and quantised afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import fp8, mlp, mlp_fp8, reference_fp8, routing
from slimtune.engine.kernels.reference_experts import experts_of
from tests.engine.kernels.maker import Maker

ACTIVATIONS = ("silu", mlp.Clamped(1.702, 0.5))
SIZES = (768, 2176)
"""A row that a program takes at once, and one that it doesn't."""


def assert_same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """To the bit; on a GPU a sum may be rounded once less here than there, which moves a few numbers by a step."""
    assert torch.allclose(found[1], want[1], rtol=1e-6 if found[1].is_cpu else 2**-7)
    differing = (found[0].view(torch.uint8) != want[0].view(torch.uint8)).float().mean()
    assert differing <= (0.0 if found[0].is_cpu else 0.01)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_forward(make: Maker, activation: mlp.Activation, size: int) -> None:
    gate, up = make(3, 2 * size).chunk(2, dim=1)
    want = mlp.gated_forward(gate, up, activation=activation)
    assert_same(mlp_fp8.gated_forward(gate, up, activation=activation), fp8.quantize(want))
    h = make.strided(3, size)
    assert_same(mlp_fp8.gated_forward(gate, up, activation=activation, out=h), fp8.quantize(want))
    assert torch.allclose(h, want, rtol=0 if h.is_cpu else 2**-7)
    assert torch.isnan(h._base[:, size:]).all()
    again = torch.tensor([3, size - 1, 700], dtype=torch.int32, device=h.device)
    assert_same(mlp_fp8.gated_forward(gate, up, activation=activation, again=again), fp8.quantize(want, again=again))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward(make: Maker, activation: mlp.Activation, size: int) -> None:
    gates, dh = make(3, 2 * size), make.strided_copy(make(3, size))
    factors = make(2 * size, dtype=torch.float32).abs() + 0.1
    want = gates.clone()
    mlp.gated_backward_(dh, *want.chunk(2, dim=1), activation=activation)
    for in_place, left in ((False, gates.clone()), (True, want)):
        given = gates.clone()
        found = mlp_fp8.gated_backward(dh, *given.chunk(2, dim=1), factors, activation=activation, in_place=in_place)
        assert_same(found, fp8.quantize(want, factors=factors))
        assert torch.allclose(given, left, rtol=0 if given.is_cpu else 2**-7)


@pytest.mark.parametrize("size", SIZES)
def test_forward_of_experts(make: Maker, size: int) -> None:
    routes = routing.sort_by_expert(torch.tensor([[0, 3], [3, 2]], device=make.device), 5)
    gate, up = make(4, 2 * size).chunk(2, dim=1)
    again = torch.randint(0, size, (5, 3), generator=make.generator, dtype=torch.int32).to(make.device)
    want = reference_fp8.quantize(mlp.gated_forward(gate, up), again=again[experts_of(routes)])
    assert_same(mlp_fp8.gated_forward(gate, up, again=again, routes=routes), want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_of_experts(make: Maker, activation: mlp.Activation, size: int) -> None:
    routes = routing.sort_by_expert(torch.tensor([[0, 3], [3, 2]], device=make.device), 5)
    gates, dh, weights = make(4, 2 * size), make.strided_copy(make(4, size)), make(2, 2).float()
    factors = make(5, 2 * size, dtype=torch.float32).abs() + 0.1
    want, dw, own = gates.clone(), torch.empty_like(weights), torch.empty_like(weights)
    how = {"activation": activation, "routes": routes, "weights": weights}
    mlp.gated_backward_(dh, *want.chunk(2, dim=1), dw=dw, **how)
    before = gates.clone()
    found = mlp_fp8.experts_backward(dh, *gates.chunk(2, dim=1), factors, dw=own, **how)
    assert_same(found, fp8.quantize(want * factors[experts_of(routes)]))
    assert torch.equal(gates, before)
    assert torch.allclose(own, dw, rtol=1e-5, atol=1e-5 * float(dw.abs().max()))
