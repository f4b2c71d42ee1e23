"""RMS norm and LayerNorm against its float64 reference and against autograd."""

from __future__ import annotations

import pytest
import torch

from slimtune.engine.kernels import norm, reference
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

SHAPES = [(37, 576), (5, 2048), (3, 80), (2, 5000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(make: Maker, shape: tuple[int, int]) -> None:
    x, weight = make.strided_copy(make(*shape, scale=3.0)), make(shape[1])
    out = make.strided(*shape)
    y, total, rstd = norm.norm_forward(x, weight, 1e-5, out=out)
    want, _, want_rstd = reference.norm_forward(x.double(), weight.double(), 1e-5)
    assert y.data_ptr() == out.data_ptr()
    assert total is x
    assert_close(y, want, dtype=make.dtype)
    assert_close(rstd, want_rstd, dtype=torch.float32)
    assert torch.isnan(out._base[:, shape[1] :]).all(), "wrote outside its columns"


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_adds_the_residual_and_rounds_it_first(make: Maker, shape: tuple[int, int]) -> None:
    x, residual, weight = make(*shape), make(*shape), make(shape[1])
    out_sum = make.strided(*shape)
    y, total, rstd = norm.norm_forward(x, weight, 1e-6, residual=residual, out_sum=out_sum)
    rounded = (x.double() + residual.double()).to(make.dtype)
    assert torch.equal(total, rounded)
    want, _, want_rstd = reference.norm_forward(rounded.double(), weight.double(), 1e-6)
    assert_close(y, want, dtype=make.dtype)
    assert_close(rstd, want_rstd, dtype=torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_is_the_gradient(make: Maker, shape: tuple[int, int], with_residual: bool) -> None:
    x, weight, dy = make(*shape, scale=2.0), make(shape[1]), make.strided_copy(make(*shape))
    dresidual = make(*shape) if with_residual else None
    _, _, rstd = norm.norm_forward(x, weight, 1e-5)
    out = make.strided(*shape)
    dx = norm.norm_backward(dy, x, weight, rstd, dresidual=dresidual, out=out)

    leaf = x.double().requires_grad_()
    torch.nn.functional.rms_norm(leaf, (shape[1],), weight.double(), 1e-5).backward(dy.double())
    want = leaf.grad if dresidual is None else leaf.grad + dresidual.double()
    assert dx.data_ptr() == out.data_ptr()
    assert_close(dx, want, dtype=make.dtype)


def test_backward_may_overwrite_the_residuals_gradient(make: Maker) -> None:
    x, weight, dy, dresidual = make(7, 576), make(576), make(7, 576), make(7, 576)
    _, _, rstd = norm.norm_forward(x, weight, 1e-5)
    want = norm.norm_backward(dy, x, weight, rstd, dresidual=dresidual)
    norm.norm_backward(dy, x, weight, rstd, dresidual=dresidual, out=dresidual)
    assert torch.equal(dresidual, want)


@pytest.mark.parametrize("shape", SHAPES)
def test_centred_it_is_layer_norm(make: Maker, shape: tuple[int, int]) -> None:
    x, weight, dy, dresidual = make(*shape, scale=2.0) + 1.5, make(shape[1]), make(*shape), make(*shape)
    y, _, rstd = norm.norm_forward(x, weight, 1e-5, centred=True)
    dx = norm.norm_backward(dy, x, weight, rstd, dresidual=dresidual, centred=True)

    leaf = x.double().requires_grad_()
    want = torch.nn.functional.layer_norm(leaf, (shape[1],), weight.double(), eps=1e-5)
    want.backward(dy.double())
    assert_close(y, want.detach(), dtype=make.dtype)
    assert_close(dx, leaf.grad + dresidual.double(), dtype=make.dtype)
