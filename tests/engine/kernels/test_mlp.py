"""The gated MLP against autograd in float64, dense and as rows of a mixture of experts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from slimtune.engine.kernels import mlp, routing
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

SHAPES = [(37, 1536), (3, 5504), (2, 80)]


CLAMPED = mlp.Clamped(alpha=1.702, limit=2.003)
"""No 16-bit number is the limit: at a clamp's edge PyTorch's versions differ."""


@pytest.fixture(params=["silu", "gelu_tanh", "sigmoid", CLAMPED], ids=["silu", "gelu_tanh", "sigmoid", "clamped"])
def activation(request: pytest.FixtureRequest) -> mlp.Activation:
    return request.param


def gate_and_up(make: Maker, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The halves of one product, with saturated gates among them."""
    both = make.strided_copy(make(shape[0], 2 * shape[1], scale=3.0))
    both[0, 0], both[0, 1] = 80.0, -80.0
    both[1, :3] = both[1, -3:] = torch.tensor([1.9, 2.1, -40.0])  # inside of a clamp, and beyond it
    return both.chunk(2, dim=1)


def alternating(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers, each gate followed by its up in one product."""
    both = torch.stack((gate, up), dim=2).flatten(1)
    wider = torch.nn.functional.pad(both, (0, 24))[:, : both.shape[1]]
    return wider[:, ::2], wider[:, 1::2]


def transformers_gated(g: Tensor, u: Tensor, activation: mlp.Activation) -> Tensor:
    if isinstance(activation, mlp.Clamped):
        experts = SimpleNamespace(alpha=activation.alpha, limit=activation.limit)
        return GptOssExperts._apply_gate(experts, torch.stack((g, u), dim=-1).flatten(-2))
    if activation == "silu":
        return torch.nn.functional.silu(g) * u
    if activation == "sigmoid":
        return torch.sigmoid(g) * u
    return torch.nn.functional.gelu(g, approximate="tanh") * u


def autograd(
    dh: Tensor, gate: Tensor, up: Tensor, activation: mlp.Activation, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """h and the gradients of gate and up; ``weight`` multiplies each row of h."""
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    h = transformers_gated(g, u, activation)
    (h if weight is None else h * weight[:, None]).backward(dh.double())
    return h.detach(), g.grad, u.grad


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(make: Maker, shape: tuple[int, int], activation: mlp.Activation) -> None:
    gate, up = gate_and_up(make, shape)
    out = make.strided(*shape)
    h = mlp.gated_forward(gate, up, activation=activation, out=out)
    assert h.data_ptr() == out.data_ptr()
    assert_close(h, autograd(h, gate, up, activation)[0], dtype=make.dtype)
    assert torch.isnan(out._base[:, shape[1] :]).all(), "wrote outside its columns"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_h", [False, True])
def test_backward_is_the_gradient(
    make: Maker, shape: tuple[int, int], with_h: bool, activation: mlp.Activation
) -> None:
    gate, up = gate_and_up(make, shape)
    dh = make.strided_copy(make(*shape))
    want_h, want_gate, want_up = autograd(dh, gate, up, activation)
    h = make.strided(*shape) if with_h else None
    mlp.gated_backward_(dh, gate, up, activation=activation, h=h)
    assert_close(gate, want_gate, dtype=make.dtype)
    assert_close(up, want_up, dtype=make.dtype)
    if h is not None:
        assert_close(h, want_h, dtype=make.dtype)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gates_and_ups_that_alternate(make: Maker, shape: tuple[int, int]) -> None:
    """The same bits as where they lie side by side."""
    gate, up = gate_and_up(make, shape)
    mixed = alternating(gate, up)
    assert mixed[0].stride(1) == 2
    assert torch.equal(mlp.gated_forward(*mixed, activation=CLAMPED), mlp.gated_forward(gate, up, activation=CLAMPED))
    dh = make(*shape)
    for pair in ((gate, up), mixed):
        mlp.gated_backward_(dh, *pair, activation=CLAMPED)
    assert torch.equal(mixed[0], gate)
    assert torch.equal(mixed[1], up)
    assert not mixed[0]._base[:, 2 * shape[1] :].any(), "wrote outside its columns"


def test_h_may_overwrite_its_gradient(make: Maker) -> None:
    gate, up = gate_and_up(make, (7, 1536))
    dh = make(7, 1536)
    want = autograd(dh, gate, up, "silu")[0]
    mlp.gated_backward_(dh, gate, up, h=dh)
    assert_close(dh, want, dtype=make.dtype)


@pytest.mark.parametrize("size", [5504, 80])
@pytest.mark.parametrize("with_dw", [False, True])
def test_rows_of_experts(make: Maker, size: int, with_dw: bool, activation: mlp.Activation) -> None:
    experts = torch.tensor([[3, 0], [1, 3], [0, 3]], device=make.device)
    routes = routing.sort_by_expert(experts, 4)
    gate, up = gate_and_up(make, (6, size))
    dh, weights = make.strided_copy(make(6, size)), make(3, 2, dtype=torch.float32)
    of_row = weights.double().flatten()[routes.order.long()]
    want_h, want_gate, want_up = autograd(dh, gate, up, activation, of_row)
    want_dw = (want_h * dh.double()).sum(1)[routes.place.long()]
    dw = make.poisoned(3, 2, dtype=torch.float32) if with_dw else None
    mlp.gated_backward_(dh, gate, up, activation=activation, routes=routes, weights=weights, dw=dw)
    assert_close(gate, want_gate, dtype=make.dtype)
    assert_close(up, want_up, dtype=make.dtype)
    if dw is not None:
        assert_close(dw, want_dw, dtype=torch.float32)


def test_weights_need_routes(make: Maker) -> None:
    gate, up = gate_and_up(make, (2, 80))
    with pytest.raises(ValueError, match="routes"):
        mlp.gated_backward_(make(2, 80), gate, up, weights=make(1, 2))
