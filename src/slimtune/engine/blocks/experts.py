"""A mixture of experts: y = Σ over each token's k experts of w · down(act(gate) x up), gate, up = gate_up(n).

Rows are (token, expert) pairs sorted by expert, so that one grouped product computes all experts: there are always
T · k rows, and only their offsets vary, on the device. The router is frozen, yet n reaches the result through its
weights too. With dh = down's dx *without* the row's weight, dw = dh · h, so that down's result is not needed again; a
bias is a further column of down's weight, and its share of dw that column of dx.
Adapters have PEFT's ``target_parameters`` form, without dropout; their columns stand beside x and W as a Site's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.engine.blocks.block import Block, Keep, Memory, Pass, Pays, Sinks
from slimtune.engine.blocks.experts_products import In16Bits, InFp8, Products, Routed
from slimtune.engine.fp8 import Fp8, channels
from slimtune.engine.kernels import fp8, norm, router, routing
from slimtune.engine.stacks import Stack
from slimtune.engine.structure import Experts, Norm
from slimtune.engine.weights import Scratch

__all__ = ["ExpertsBlock"]

_CHANNELS = 64
"""Of each expert's inputs, those whose losses its products in FP8 take in at most."""


class ExpertsBlock(Block):
    """E experts of F gates and ups, k to a token. It keeps routes and gates from :attr:`Keep.GATES` on."""

    sites = ()

    def __init__(self, part: Experts, dtype: torch.dtype, device: torch.device, scratch: Scratch) -> None:
        self.part, self.dtype = part, dtype
        self.gate_up, self.down = (Stack(stack, dtype, device, scratch) for stack in part.stacks)
        self.stacks = (self.gate_up, self.down)
        wide = torch.promote_types(dtype, torch.float32) if part.router.wide else dtype
        self._in_16_bits = ""
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

    def use_fp8(self, pays: Pays, tokens: int, switch: Fp8 | None) -> None:
        """See :meth:`Block.use_fp8`; both stacks or none."""
        rows, stacks = tokens * self.part.router.choice.k, self.stacks
        if any(stack.rank for stack in stacks):
            self._in_16_bits = "experts stay in bf16, as they have adapters"
        elif self.part.interleaved or not all(stack.fits_fp8 and (not switch or stack.is_nf4) for stack in stacks):
            self._in_16_bits = "experts stay in bf16, as they have biases or aren't in NF4"
        elif not all(pays(rows, stack.inputs, stack.outputs, stack.experts) for stack in stacks):
            self._in_16_bits = "experts stay in bf16, as they are too small or get too few tokens to gain by FP8"
        elif not all(fp8.has_grouped_product(stack.device, stack.experts) for stack in stacks):
            self._in_16_bits = "experts stay in bf16, as torch has no grouped product in FP8 on this GPU"
        else:
            for stack in stacks:
                own = min(_CHANNELS, channels(stack.inputs, stack.outputs))
                stack.use_fp8(switch, own, recomputed=stack is self.gate_up)

    @property
    def in_16_bits(self) -> str:
        """See :attr:`Block.in_16_bits`."""
        return self._in_16_bits

    @property
    def fp8_products(self) -> float:
        """See :attr:`Block.fp8_products`."""
        return self.products if self.gate_up.eighths else 0.0

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """See :meth:`Block.forward`."""
        products = self._products(gates=True, results=True)
        y = torch.empty(on.tokens, self.columns, dtype=self.dtype, device=n.device)
        kept = []
        for rows in on.chunks:
            routed, gates = self._gates(n[rows], products)
            hidden = products.hidden(gates, routed.routes)
            if keep is not None and keep >= Keep.GATES:
                kept.append((routed, gates))
            del gates  # not beside the results
            results = products.results(hidden, routed.routes)
            del hidden
            routing.combine(results, routed.routes, weights=routed.weights, out=y[rows])
            del routed, results  # not beside the next chunk's
        return y, kept or None

    def _products(self, *, gates: bool = False, results: bool = False, backward: bool = False) -> Products:
        """One pass's, of which so much will be asked."""
        if self.gate_up.in_fp8 is None:
            return In16Bits(self.part, self.gate_up, self.down)
        return InFp8(self.part, self.gate_up, self.down, gates=gates, results=results, backward=backward)

    def _gates(self, n: Tensor, products: Products) -> tuple[Routed, Tensor]:
        """Routes and gates of some tokens' n [T, H]."""
        by = self.part.router
        logits = torch.nn.functional.linear(
            self._normed(n, by.norm).to(self._router.dtype), self._router, self._logits_bias
        )
        weights, experts = router.choose(logits, by.choice, bias=by.bias, expert_scale=by.expert_scale)
        routes = routing.sort_by_expert(experts, self.part.gate_up.experts)
        gates = products.gates(self._normed(n, self.part.norm), routes)
        return Routed(logits, weights, experts, routes), gates

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """See :meth:`Block.backward`."""
        if not need_dx and not self.trained:
            return None
        products = self._products(gates=kept is None, backward=True)
        dn = torch.empty(on.tokens, self.columns, dtype=self.dtype, device=dy.device)
        for number, rows in enumerate(on.chunks):
            own = None if n is None else n[rows]
            if kept is None:
                assert own is not None
                routed, gates = self._gates(own, products)
            else:
                routed, gates = kept[number]
                kept[number] = None
            dw, dgates = products.down_backward(dy[rows], gates, routed, sinks)
            del gates  # in FP8 not beside dx
            read = self._normed(own, self.part.norm) if self.gate_up.rank and own is not None else None
            dx = products.gates_backward(dgates, read, routed.routes, sinks)
            if need_dx:
                self._input_backward(dx, dw, own, routed, dn[rows])
            del routed, dw, dgates, dx  # not beside the next chunk's
        return dn if need_dx else None

    def _input_backward(self, dx: Tensor, dw: Tensor, n: Tensor | None, routed: Routed, out: Tensor) -> None:
        """dn [T, H] of the rows' dx [R, H] and the router weights' gradient [T, k], by way of the norms."""
        by = self.part.router
        dlogits = router.choose_backward(dw, routed.logits, routed.experts, by.choice, expert_scale=by.expert_scale)
        through_router = torch.mm(dlogits.to(self._router.dtype), self._router).to(self.dtype)
        if by.norm is None:
            routing.combine(dx, routed.routes, addend=through_router, out=out)
            return
        assert n is not None
        assert self.part.norm is not None
        d = self._norm_backward(through_router, n, by.norm)
        self._norm_backward(routing.combine(dx, routed.routes), n, self.part.norm, beside=d, out=out)

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
        nbytes = columns * self.dtype.itemsize
        if self.gate_up.eighths:
            # dy's rows and dh beside gates; or gates' gradient beside dx; or x's rows beside gates. And rows' scales.
            gradient, own = gates, hidden + 2 * self.gate_up.channels
            nbytes = 8 + max(hidden + 3 * gates, 4 * gates, gradient + 2 * hidden, own + 2 * gates)
        chunk = min(memory.tokens, memory.mlp_tokens) * self.part.router.choice.k * nbytes
        return memory.tokens * 3 * hidden * self.dtype.itemsize + chunk

    def rows(self, memory: Memory) -> int:
        """See :meth:`Block.rows`."""
        pairs = min(memory.tokens, memory.mlp_tokens) * self.part.router.choice.k
        return max(1, pairs // self.part.gate_up.experts)

    def chunks(self, memory: Memory) -> int:
        """See :meth:`Block.chunks`."""
        return -(-memory.tokens // memory.mlp_tokens)

    @property
    def adapted_columns(self) -> int:
        """See :attr:`Block.adapted_columns`."""
        return self.part.router.choice.k * super().adapted_columns

    @property
    def products(self) -> float:
        """See :attr:`Block.products`."""
        stacks = (self.part.gate_up, self.part.down)
        return float(self.part.router.choice.k * sum(stack.in_features * stack.out_features for stack in stacks))

    def products_again(self, keep: Keep) -> float:
        """See :meth:`Block.products_again`."""
        first = self.part.gate_up
        return float(self.part.router.choice.k * first.in_features * first.out_features) if keep < Keep.GATES else 0.0
