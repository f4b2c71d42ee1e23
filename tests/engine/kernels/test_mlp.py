"""SwiGLU against its float64 reference and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import mlp
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

SHAPES = [(37, 1536), (3, 5504), (2, 80)]


def gate_and_up(make: Maker, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The halves of one product, with saturated gates among them."""
    both = make.strided_copy(make(shape[0], 2 * shape[1], scale=3.0))
    both[0, 0], both[0, 1] = 80.0, -80.0
    return both.chunk(2, dim=1)


def autograd(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    h = torch.nn.functional.silu(g) * u
    h.backward(dh.double())
    return h.detach(), g.grad, u.grad


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(make: Maker, shape: tuple[int, int]) -> None:
    gate, up = gate_and_up(make, shape)
    out = make.strided(*shape)
    h = mlp.swiglu_forward(gate, up, out=out)
    assert h.data_ptr() == out.data_ptr()
    assert_close(h, autograd(h, gate, up)[0], dtype=make.dtype)
    assert torch.isnan(out._base[:, shape[1] :]).all(), "wrote outside its columns"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_h", [False, True])
def test_backward_is_the_gradient(make: Maker, shape: tuple[int, int], with_h: bool) -> None:
    gate, up = gate_and_up(make, shape)
    dh = make.strided_copy(make(*shape))
    want_h, want_gate, want_up = autograd(dh, gate, up)
    h = make.strided(*shape) if with_h else None
    mlp.swiglu_backward_(dh, gate, up, h=h)
    assert_close(gate, want_gate, dtype=make.dtype)
    assert_close(up, want_up, dtype=make.dtype)
    if h is not None:
        assert_close(h, want_h, dtype=make.dtype)


def test_h_may_overwrite_its_gradient(make: Maker) -> None:
    gate, up = gate_and_up(make, (7, 1536))
    dh = make(7, 1536)
    want = autograd(dh, gate, up)[0]
    mlp.swiglu_backward_(dh, gate, up, h=dh)
    assert_close(dh, want, dtype=make.dtype)
