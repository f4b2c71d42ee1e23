"""The gated MLP's results in FP8 are what is made in 16 bits and quantised afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import fp8, mlp, mlp_fp8
from tests.engine.kernels.maker import Maker

ACTIVATIONS = ("silu", mlp.Clamped(1.702, 0.5))
SIZE = 2176


def same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """To the bit; on a GPU a sum may be rounded once less here than there, which moves a few numbers by a step."""
    assert torch.allclose(found[1], want[1], rtol=1e-6 if found[1].is_cpu else 2**-7)
    differing = (found[0].view(torch.uint8) != want[0].view(torch.uint8)).float().mean()
    assert differing <= (0.0 if found[0].is_cpu else 0.01)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_forward(make: Maker, activation: mlp.Activation) -> None:
    gate, up = make(3, 2 * SIZE).chunk(2, dim=1)
    want = mlp.gated_forward(gate, up, activation=activation)
    same(mlp_fp8.gated_forward(gate, up, activation=activation), fp8.quantize(want))
    h = make.strided(3, SIZE)
    same(mlp_fp8.gated_forward(gate, up, activation=activation, out=h), fp8.quantize(want))
    assert torch.allclose(h, want, rtol=0 if h.is_cpu else 2**-7)
    assert torch.isnan(h._base[:, SIZE:]).all()
    again = torch.tensor([3, SIZE - 1, 700], dtype=torch.int32, device=h.device)
    same(mlp_fp8.gated_forward(gate, up, activation=activation, again=again), fp8.quantize(want, again=again))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward(make: Maker, activation: mlp.Activation) -> None:
    gates, dh = make(3, 2 * SIZE), make.strided_copy(make(3, SIZE))
    factors = make(2 * SIZE, dtype=torch.float32).abs() + 0.1
    want = gates.clone()
    mlp.gated_backward_(dh, *want.chunk(2, dim=1), activation=activation)
    for in_place, left in ((False, gates.clone()), (True, want)):
        given = gates.clone()
        found = mlp_fp8.gated_backward(dh, *given.chunk(2, dim=1), factors, activation=activation, in_place=in_place)
        same(found, fp8.quantize(want, factors=factors))
        assert torch.allclose(given, left, rtol=0 if given.is_cpu else 2**-7)
