"""The products of a mixture's experts and what stands between them, in the compute dtype or in FP8.

Rows are (token, expert) pairs sorted by expert. Each way makes the weights that it needs when it is made, so that all
chunks of a pass share them; both give the same results, but for rounding.

In FP8 a token's rows are quantised as they are gathered, activations as the MLP's kernel makes them, and gradients by
their expert's scales: there is no pass more than in 16 bits, and each writes half. Adapters and biases aren't in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks.block import Sinks
from slimtune.engine.fp8 import Rows
from slimtune.engine.kernels import fp8, grouped, grouped_lora, mlp, mlp_fp8, routing
from slimtune.engine.kernels.reference_experts import experts_of
from slimtune.engine.stacks import Fp8Stack, Stack
from slimtune.engine.structure import Experts

__all__ = ["In16Bits", "InFp8", "Products", "Routed"]


@dataclass(frozen=True)
class Routed:
    """Where the tokens of one chunk go."""

    logits: Tensor
    """[T, E]."""
    weights: Tensor
    """float32 [T, k]."""
    experts: Tensor
    """int32 [T, k]."""
    routes: routing.Routes


class Products(ABC):
    """One pass through both stacks, chunk by chunk."""

    def __init__(self, part: Experts) -> None:
        self.part = part

    @abstractmethod
    def gates(self, n: Tensor, routes: routing.Routes) -> Tensor:
        """Gates and ups [R, 2 F] of what the experts read, n [T, H]."""

    @abstractmethod
    def hidden(self, gates: Tensor, routes: routing.Routes) -> Any:
        """act(gate) x up, as :meth:`results` takes it."""

    @abstractmethod
    def results(self, hidden: Any, routes: routing.Routes) -> Tensor:
        """The experts' results [R, H], without the router's weights."""

    @abstractmethod
    def down_backward(self, dy: Tensor, gates: Tensor, routed: Routed, sinks: Sinks) -> tuple[Tensor, Any]:
        """The gradients of the router's weights [T, k], and of the gates as :meth:`gates_backward` takes it.

        Args:
            dy: [T, H].
            gates: The forward's; may be overwritten.
            routed: The forward's.
            sinks: Where adapters' gradients go.
        """

    @abstractmethod
    def gates_backward(self, dgates: Any, n: Tensor | None, routes: routing.Routes, sinks: Sinks) -> Tensor:
        """The gradient of what the experts read, by rows [R, H].

        Args:
            dgates: As :meth:`down_backward` gave it.
            n: What they read, [T, H]; None where no adapter needs it.
            routes: The forward's.
            sinks: Where adapters' gradients go.
        """

    def halves(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, each [R, F]."""
        inner = gates.shape[1] // 2
        return (gates[:, ::2], gates[:, 1::2]) if self.part.interleaved else (gates[:, :inner], gates[:, inner:])


class In16Bits(Products):
    """In the compute dtype, whichever it is: adapters and biases stand in further columns, as a Site's do."""

    def __init__(self, part: Experts, gate_up: Stack, down: Stack) -> None:
        super().__init__(part)
        self._gate_up, self._down = gate_up, down
        self._gate_up_weight, self._down_weight = gate_up.weight(), down.weight()

    def gates(self, n: Tensor, routes: routing.Routes) -> Tensor:
        """See :meth:`Products.gates`."""
        x = self._inputs(n, routes)
        self._gate_up.weigh(x, self._gate_up_weight, routes)
        return grouped.grouped_forward(x, self._gate_up_weight, routes.ends)

    def hidden(self, gates: Tensor, routes: routing.Routes) -> Any:
        """See :meth:`Products.hidden`; with the adapter's columns and the bias' [R, F + extra]."""
        stack = self._down
        h = gates.new_empty(gates.shape[0], stack.inputs + stack.extra)
        mlp.gated_forward(*self.halves(gates), activation=self.part.activation, out=h[:, : stack.inputs])
        stack.fill_extra(h, routes)
        return h

    def results(self, hidden: Any, routes: routing.Routes) -> Tensor:
        """See :meth:`Products.results`."""
        self._down.weigh(hidden, self._down_weight, routes)
        return grouped.grouped_forward(hidden, self._down_weight, routes.ends)

    def _inputs(self, n: Tensor, routes: routing.Routes) -> Tensor:
        """gate_up's input [R, H + extra]."""
        stack = self._gate_up
        x = n.new_empty(routes.order.shape[0], stack.inputs + stack.extra)
        routing.gather_rows(n, routes, out=x[:, : stack.inputs])
        stack.fill_extra(x, routes)
        return x

    def down_backward(self, dy: Tensor, gates: Tensor, routed: Routed, sinks: Sinks) -> tuple[Tensor, Any]:
        """See :meth:`Products.down_backward`; gates are overwritten with their gradient."""
        down, routes = self._down, routed.routes
        dy = routing.gather_rows(dy, routes)
        dh = grouped.grouped_backward(dy, self._down_weight, routes.ends)
        if down.rank:
            self._adapter_backward(down, dy, self.hidden(gates, routes), dh, routes, routed.weights, sinks)
        dw = torch.empty_like(routed.weights)
        mlp.gated_backward_(
            dh[:, : down.inputs], *self.halves(gates),
            activation=self.part.activation, routes=routes, weights=routed.weights, dw=dw,
        )  # fmt: skip
        if down.bias_column is not None:
            dw += dh[:, down.bias_column][routes.place]
        return dw, gates

    def gates_backward(self, dgates: Any, n: Tensor | None, routes: routing.Routes, sinks: Sinks) -> Tensor:
        """See :meth:`Products.gates_backward`."""
        stack = self._gate_up
        dx = grouped.grouped_backward(dgates, self._gate_up_weight, routes.ends)
        if stack.rank:
            assert n is not None
            self._adapter_backward(stack, dgates, self._inputs(n, routes), dx, routes, None, sinks)
        return dx[:, : stack.inputs]

    @staticmethod
    def _adapter_backward(
        stack: Stack,
        dy: Tensor,
        x: Tensor,
        dx: Tensor,
        routes: routing.Routes,
        weights: Tensor | None,
        sinks: Sinks,
    ) -> None:
        """Add the adapter's gradients, and its share to dx [R, inputs + extra], whose further columns hold du.

        Args:
            stack: The stack.
            dy: [R, outputs].
            x: [R, inputs + extra], the stack's input with u.
            dx: The frozen product's.
            routes: The rows'.
            weights: The rows' own, where dy is without them.
            sinks: Where the gradients go.
        """
        sink, columns = sinks[stack], slice(stack.inputs, stack.inputs + stack.rank)
        grouped_lora.expert_up_backward_(dy, x[:, columns], routes, stack.scaling, db=sink.b[0], weights=weights)
        grouped_lora.expert_down_backward_(
            dx[:, columns], x[:, : stack.inputs], stack.a, routes, da=sink.a, dx=dx[:, : stack.inputs], weights=weights
        )


class InFp8(Products):
    """In FP8.

    Args:
        part: The mixture.
        gate_up: Its stack, as all of its weights multiplied in FP8.
        down: Likewise.
        gates: Whether :meth:`gates` will be asked.
        results: Whether :meth:`results` will be.
        backward: Whether the others will be.
    """

    def __init__(
        self, part: Experts, gate_up: Stack, down: Stack, *, gates: bool, results: bool, backward: bool
    ) -> None:
        super().__init__(part)
        assert gate_up.in_fp8 is not None
        assert down.in_fp8 is not None
        self._gate_up, self._down = gate_up.in_fp8, down.in_fp8
        self._own = gate_up.operands(upright=gates, turned=backward)
        self._others = down.operands(upright=results, turned=backward)

    def gates(self, n: Tensor, routes: routing.Routes) -> Tensor:
        """See :meth:`Products.gates`."""
        weight, eight = self._own[0], self._gate_up
        assert weight is not None
        return fp8.grouped_product(
            *fp8.quantize(n, routes=routes, again=eight.again), weight, eight.factors, routes.ends
        )

    def hidden(self, gates: Tensor, routes: routing.Routes) -> Any:
        """See :meth:`Products.hidden`."""
        how: dict[str, Any] = {"activation": self.part.activation, "again": self._down.again, "routes": routes}
        return mlp_fp8.gated_forward(*self.halves(gates), **how)

    def results(self, hidden: Any, routes: routing.Routes) -> Tensor:
        """See :meth:`Products.results`."""
        (values, scales), weight = hidden, self._others[0]
        assert weight is not None
        return fp8.grouped_product(values, scales, weight, self._down.factors, routes.ends)

    def down_backward(self, dy: Tensor, gates: Tensor, routed: Routed, sinks: Sinks) -> tuple[Tensor, Any]:
        """See :meth:`Products.down_backward`."""
        routes, factors, switch = routed.routes, self._gate_up.factors, self._gate_up.switch
        dh = self._turned(switch.quantize(dy, self._down.factors, routes), self._others[1], self._down, routes)
        dw, activation = torch.empty_like(routed.weights), self.part.activation
        how: dict[str, Any] = {"activation": activation, "routes": routes, "weights": routed.weights, "dw": dw}
        if switch.counted is None:
            return dw, mlp_fp8.experts_backward(dh, *self.halves(gates), factors, **how)
        mlp.gated_backward_(dh, *self.halves(gates), **how)
        return dw, switch.quantize(gates * factors[experts_of(routes)])

    def gates_backward(self, dgates: Any, n: Tensor | None, routes: routing.Routes, sinks: Sinks) -> Tensor:
        """See :meth:`Products.gates_backward`."""
        return self._turned(dgates, self._own[1], self._gate_up, routes)

    @staticmethod
    def _turned(dy: Rows, weight: Tensor | None, eight: Fp8Stack, routes: routing.Routes) -> Tensor:
        """dy's product with the transposes; the weights' own scales are in it."""
        assert weight is not None
        return fp8.grouped_product(*dy, weight, eight.ones.expand(len(weight), -1), routes.ends)
