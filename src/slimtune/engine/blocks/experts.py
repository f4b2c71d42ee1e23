"""A mixture of experts: y = Σ over each token's k experts of w · down(act(gate) x up), gate, up = gate_up(n).

Rows are (token, expert) pairs sorted by expert, so that one grouped product computes all experts: there are always
T · k rows, and only their offsets vary, on the device. The router is frozen, yet n reaches the result through its
weights too. With dh = down's dx *without* the row's weight, dw = dh · h, so that down's result is not needed again; a
bias is a further column of down's weight, and its share of dw that column of dx.
Adapters have PEFT's ``target_parameters`` form, without dropout; their columns stand beside x and W as a Site's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks.block import Block, Keep, Memory, Pass, Sinks
from slimtune.engine.kernels import grouped, grouped_lora, mlp, norm, router, routing
from slimtune.engine.structure import Experts, Norm
from slimtune.engine.weights import Scratch, Stack

__all__ = ["ExpertsBlock"]


@dataclass
class _Kept:
    """Of one chunk of tokens."""

    logits: Tensor
    """[T, E]."""
    weights: Tensor
    """float32 [T, k]."""
    experts: Tensor
    """int32 [T, k]."""
    routes: routing.Routes
    gates: Tensor
    """[R, 2 F]."""


class ExpertsBlock(Block):
    """E experts of F gates and ups, k to a token. It keeps routes and gates from :attr:`Keep.GATES` on."""

    sites = ()

    def __init__(self, part: Experts, dtype: torch.dtype, device: torch.device, scratch: Scratch) -> None:
        self.part, self.dtype = part, dtype
        self.gate_up, self.down = (Stack(stack, dtype, device, scratch) for stack in part.stacks)
        self.stacks = (self.gate_up, self.down)
        wide = torch.promote_types(dtype, torch.float32) if part.router.wide else dtype
        self._router = part.router.weight.detach().to(wide)
        bias = part.router.logits_bias
        self._logits_bias = None if bias is None else bias.detach().to(wide)

    @property
    def columns(self) -> int:
        """H: no columns of its own."""
        return self.part.gate_up.in_features

    @property
    def reads_input(self) -> bool:
        """For the gradients of gate_up's adapters, and for the norms' backward."""
        return self.gate_up.rank > 0 or self.part.norm is not None or self.part.router.norm is not None

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        gate_up, down = self.gate_up.weight(), self.down.weight()
        y = torch.empty(on.tokens, self.columns, dtype=self.dtype, device=n.device)
        kept = []
        for rows in on.chunks:
            chunk = self._gates(n[rows], gate_up)
            results = grouped.grouped_forward(self._hidden(chunk), down, chunk.routes.ends)
            routing.combine(results, chunk.routes, weights=chunk.weights, out=y[rows])
            if keep is not None and keep >= Keep.GATES:
                kept.append(chunk)
            del chunk, results  # not beside the next one's
        return y, kept or None

    def _gates(self, n: Tensor, gate_up: Tensor) -> _Kept:
        """Routes and gates of some tokens' n [T, H]."""
        by = self.part.router
        logits = torch.nn.functional.linear(
            self._normed(n, by.norm).to(self._router.dtype), self._router, self._logits_bias
        )
        weights, experts = router.choose(logits, by.choice, bias=by.bias, expert_scale=by.expert_scale)
        routes = routing.sort_by_expert(experts, self.part.gate_up.experts)
        gates = grouped.grouped_forward(self._inputs(n, routes), gate_up, routes.ends)
        return _Kept(logits, weights, experts, routes, gates)

    def _inputs(self, n: Tensor, routes: routing.Routes) -> Tensor:
        """gate_up's input [R, H + extra]."""
        x = n.new_empty(routes.order.shape[0], self.gate_up.inputs + self.gate_up.extra)
        routing.gather_rows(self._normed(n, self.part.norm), routes, out=x[:, : self.gate_up.inputs])
        self.gate_up.fill_extra(x, routes)
        return x

    def _hidden(self, chunk: _Kept) -> Tensor:
        """down's input [R, F + extra]."""
        h = chunk.gates.new_empty(chunk.gates.shape[0], self.down.inputs + self.down.extra)
        mlp.gated_forward(*self._halves(chunk), activation=self.part.activation, out=h[:, : self.down.inputs])
        self.down.fill_extra(h, chunk.routes)
        return h

    def _halves(self, chunk: _Kept) -> tuple[Tensor, Tensor]:
        """Gate and up, each [R, F]."""
        gates, inner = chunk.gates, self.down.inputs
        return (gates[:, ::2], gates[:, 1::2]) if self.part.interleaved else (gates[:, :inner], gates[:, inner:])

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`."""
        if not need_dx and not self.trained:
            return None
        gate_up, down = self.gate_up.weight(), self.down.weight()
        dn = torch.empty(on.tokens, self.columns, dtype=self.dtype, device=dy.device)
        for number, rows in enumerate(on.chunks):
            if kept is None:
                assert n is not None
                chunk = self._gates(n[rows], gate_up)
            else:
                chunk = kept[number]
                kept[number] = None
            dw = self._down_backward(dy[rows], chunk, down, sinks)
            dx = grouped.grouped_backward(chunk.gates, gate_up, chunk.routes.ends)
            if self.gate_up.rank:
                assert n is not None
                self._adapter_backward(
                    self.gate_up, chunk.gates, self._inputs(n[rows], chunk.routes), dx, chunk.routes, None, sinks
                )
            if need_dx:
                self._input_backward(dx[:, : self.gate_up.inputs], dw, None if n is None else n[rows], chunk, dn[rows])
            del chunk, dw, dx  # not beside the next chunk's
        return dn if need_dx else None

    def _input_backward(self, dx: Tensor, dw: Tensor, n: Tensor | None, chunk: _Kept, out: Tensor) -> None:
        """dn [T, H] of the rows' dx [R, H] and the router weights' gradient [T, k], by way of the norms."""
        by = self.part.router
        dlogits = router.choose_backward(dw, chunk.logits, chunk.experts, by.choice, expert_scale=by.expert_scale)
        through_router = torch.mm(dlogits.to(self._router.dtype), self._router).to(self.dtype)
        if by.norm is None:
            routing.combine(dx, chunk.routes, addend=through_router, out=out)
            return
        assert n is not None
        assert self.part.norm is not None
        d = self._norm_backward(through_router, n, by.norm)
        self._norm_backward(routing.combine(dx, chunk.routes), n, self.part.norm, beside=d, out=out)

    @staticmethod
    def _normed(n: Tensor, over: Norm | None) -> Tensor:
        """n, or what a norm of the block's own makes of it."""
        return n if over is None else norm.norm_forward(n, over.weight, over.eps, centred=over.centred)[0]

    @staticmethod
    def _norm_backward(
        d: Tensor, n: Tensor, over: Norm, *, beside: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient of n, and what is added to it; the norm is computed again."""
        rstd = norm.norm_forward(n, over.weight, over.eps, centred=over.centred)[2]
        return norm.norm_backward(d, n, over.weight, rstd, dresidual=beside, centred=over.centred, out=out)

    def _down_backward(self, dy: Tensor, chunk: _Kept, down: Tensor, sinks: Sinks) -> Tensor:
        """The router weights' gradient [T, k]; the chunk's gates are overwritten with theirs."""
        dy = routing.gather_rows(dy, chunk.routes)
        dh = grouped.grouped_backward(dy, down, chunk.routes.ends)
        if self.down.rank:
            self._adapter_backward(self.down, dy, self._hidden(chunk), dh, chunk.routes, chunk.weights, sinks)
        dw = torch.empty_like(chunk.weights)
        mlp.gated_backward_(
            dh[:, : self.down.inputs], *self._halves(chunk),
            activation=self.part.activation, routes=chunk.routes, weights=chunk.weights, dw=dw,
        )  # fmt: skip
        if self.down.bias_column is not None:
            dw += dh[:, self.down.bias_column][chunk.routes.place]
        return dw

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

    # -- sizes ----------------------------------------------------------------------------------------------------

    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """See :meth:`Block.kept_bytes`."""
        if keep < Keep.GATES:
            return 0
        k, experts = self.part.router.choice.k, self.part.gate_up.experts
        columns = k * self.part.gate_up.out_features
        return (
            memory.tokens * columns * self.dtype.itemsize
            + memory.tokens * (experts * self._router.dtype.itemsize + 4 * 4 * k)
            + 4 * experts
        )

    def working_bytes(self, memory: Memory) -> int:
        """See :meth:`Block.working_bytes`."""
        hidden, gates = self.columns, self.part.gate_up.out_features
        # dy's rows beside gates, then dh; or gates beside dx, all for a chunk; n, dn and y for all tokens.
        columns = hidden + gates + gates // 2 + self.gate_up.extra + self.down.extra
        if self.down.rank:
            columns += gates // 2
        if self.gate_up.rank:
            columns = max(columns, 2 * hidden + gates + 2 * self.gate_up.extra)
        chunk = min(memory.tokens, memory.mlp_tokens) * self.part.router.choice.k * columns
        return (memory.tokens * 3 * hidden + chunk) * self.dtype.itemsize

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        pairs = min(memory.tokens, memory.mlp_tokens) * self.part.router.choice.k
        return max(1, pairs // self.part.gate_up.experts)

    @property
    def products(self) -> float:
        """See :attr:`Block.products`."""
        stacks = (self.part.gate_up, self.part.down)
        return float(self.part.router.choice.k * sum(stack.in_features * stack.out_features for stack in stacks))

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        first = self.part.gate_up
        return float(self.part.router.choice.k * first.in_features * first.out_features) if keep < Keep.GATES else 0.0
