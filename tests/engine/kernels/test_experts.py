"""A whole block of experts, forward and backward, made of the kernels, against Transformers' own under autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from slimtune.engine.kernels import grouped, grouped_lora, mlp, router, routing
from slimtune.engine.kernels.router import Choice
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

HIDDEN, INNER, RANK, SCALING = 40, 24, 4, 2.0
# tokens, experts, experts a token, whether all choose the same ones: even, skewed with six of eight experts empty, one
# expert a token, every expert, one token.
CASES = {
    "even": (16, 8, 2, False),
    "skewed": (20, 8, 2, True),
    "one": (10, 5, 1, False),
    "every": (5, 4, 4, False),
    "token": (1, 8, 3, False),
}


@dataclass
class Layer:
    """A router and two stacks of matrices, an adapter to each: A [E, r, in], B [E, out, r]."""

    gate: Tensor
    gate_up: Tensor
    down: Tensor
    adapters: dict[str, Tensor]


def layer_of(make: Maker, experts: int) -> Layer:
    adapters = {
        "a1": make(experts, RANK, HIDDEN, scale=0.2),
        "b1": make(experts, 2 * INNER, RANK, scale=0.2),
        "a2": make(experts, RANK, INNER, scale=0.2),
        "b2": make(experts, HIDDEN, RANK, scale=0.2),
    }
    gate, down = make(experts, HIDDEN, scale=0.3), make(experts, HIDDEN, INNER, scale=0.2)
    return Layer(gate, make(experts, 2 * INNER, HIDDEN, scale=0.2), down, adapters)


def expected(x: Tensor, g: Tensor, layer: Layer, choice: Choice) -> tuple[Tensor, dict[str, Tensor]]:
    """y, and the gradients of x and the adapters, in float64."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=len(layer.gate),
        num_experts_per_tok=choice.k, norm_topk_prob=choice.renormalise,
    )  # fmt: skip
    config._experts_implementation = "eager"
    leaves = {name: a.double().requires_grad_() for name, a in ({"x": x} | layer.adapters).items()}
    weights = {
        "gate.weight": layer.gate.double(),
        "experts.gate_up_proj": layer.gate_up.double() + SCALING * leaves["b1"] @ leaves["a1"],
        "experts.down_proj": layer.down.double() + SCALING * leaves["b2"] @ leaves["a2"],
    }
    y = functional_call(Qwen3MoeSparseMoeBlock(config), weights, (leaves["x"][None],))[0]
    y.backward(g.double())
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def widened(stack: Tensor, b: Tensor) -> Tensor:
    return torch.cat((stack, SCALING * b), dim=2)


def computed(x: Tensor, g: Tensor, layer: Layer, choice: Choice) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by the kernels."""
    a = layer.adapters
    up, down = widened(layer.gate_up, a["b1"]), widened(layer.down, a["b2"])
    logits = x @ layer.gate.T
    weights, experts = router.choose(logits, choice)
    routes = routing.sort_by_expert(experts, len(layer.gate))
    rows, h = x.new_empty(experts.numel(), HIDDEN + RANK), x.new_empty(experts.numel(), INNER + RANK)
    routing.gather_rows(x, routes, out=rows[:, :HIDDEN])
    grouped_lora.expert_down(rows[:, :HIDDEN], a["a1"], routes, out=rows[:, HIDDEN:])
    gates = grouped.grouped_forward(rows, up, routes.ends)
    gate, gate_up = gates.chunk(2, dim=1)
    mlp.gated_forward(gate, gate_up, out=h[:, :INNER])
    grouped_lora.expert_down(h[:, :INNER], a["a2"], routes, out=h[:, INNER:])
    y = routing.combine(grouped.grouped_forward(h, down, routes.ends), routes, weights=weights)

    grads = {name: torch.zeros_like(value) for name, value in a.items()}
    # The output's gradient without the router's weights, which come in where the rows' sums are taken.
    dy = routing.gather_rows(g, routes)
    product = grouped.grouped_backward(dy, down, routes.ends)
    dh, du = product[:, :INNER], product[:, INNER:]
    grouped_lora.expert_up_backward_(dy, h[:, INNER:], routes, SCALING, db=grads["b2"], weights=weights)
    grouped_lora.expert_down_backward_(
        du, h[:, :INNER], a["a2"], routes, da=grads["a2"], dx=dh, weights=weights
    )  # fmt: skip
    dw = torch.empty_like(weights)
    mlp.gated_backward_(dh, gate, gate_up, routes=routes, weights=weights, dw=dw)
    product = grouped.grouped_backward(gates, up, routes.ends)
    drows, du = product[:, :HIDDEN], product[:, HIDDEN:]
    grouped_lora.expert_up_backward_(gates, rows[:, HIDDEN:], routes, SCALING, db=grads["b1"])
    grouped_lora.expert_down_backward_(du, rows[:, :HIDDEN], a["a1"], routes, da=grads["a1"], dx=drows)
    dlogits = router.choose_backward(dw, logits, experts, choice)
    grads["x"] = routing.combine(drows, routes, addend=dlogits @ layer.gate)
    return y, grads


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("renormalise", [True, False])
def test_block_is_transformers(device: str, case: str, renormalise: bool) -> None:
    tokens, experts, slots, skewed = CASES[case]
    make = Maker(device, torch.float32)
    layer, choice = layer_of(make, experts), Choice(slots, renormalise=renormalise)
    x, g = make(tokens, HIDDEN), make(tokens, HIDDEN)
    if skewed:
        x[:, 0], layer.gate[:, 0] = 8.0, torch.arange(experts, 0, -1, device=device)
    want, want_grads = expected(x, g, layer, choice)
    y, grads = computed(x, g, layer, choice)
    assert_close(y, want, dtype=torch.float32)
    for name, want_grad in want_grads.items():
        assert_close(grads[name], want_grad, dtype=torch.float32, factor=2.0)  # several products one after the other
