"""The frozen matrices of all experts, their adapters beside them: as a projection's weight, with a matrix an expert.

In FP8 (:mod:`slimtune.engine.fp8`) a stack is one weight of E times N rows, but for its transposes, which are each
matrix's own. Only stacks without adapter and bias are multiplied so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.engine.fp8 import Fp8, Fp8Weight
from slimtune.engine.kernels import fp8, grouped, grouped_lora, mxfp4, nf4
from slimtune.engine.kernels.formats import NestedScales, Nf4Weight, dynamic_map
from slimtune.engine.kernels.routing import Routes
from slimtune.engine.structure import ExpertStack
from slimtune.engine.weights import ALIGNMENT, Gradients, Scratch

__all__ = ["Fp8Stack", "Stack"]

_NF4_BLOCK = 64  # weights to one scale, as base.packed makes them
_NESTED_BLOCK = 256  # and scales to one scale of scales


class Fp8Stack(Fp8Weight):
    """A stack's weight in FP8: its matrices one below the other, [E N, inputs], and their transposes each by itself.

    Args:
        weight: Gives all of it as NF4, wherever it is just now: ``shape`` is (E N, inputs).
        experts: E.
        inputs: Columns.
        count: As :class:`slimtune.engine.fp8.Fp8Weight` has it; each expert has its own channels.
        switch: The model's.
    """

    def __init__(self, weight: Callable[[], Nf4Weight], experts: int, inputs: int, count: int, switch: Fp8) -> None:
        super().__init__(lambda: (weight(),), inputs, count, switch)
        self.experts, self.again = experts, self.again.repeat(experts, 1)

    @property
    def factors(self) -> Tensor:
        """The scales by expert, float32 [E, N]."""
        return self.scales.view(self.experts, -1)

    def weigh_experts(self, x: Tensor, weight: Tensor, routes: Routes) -> None:
        """As :meth:`slimtune.engine.fp8.Fp8Weight.weigh`, for each expert. The host waits for the rows' ends.

        Args:
            x: [R, inputs].
            weight: [E, N, inputs].
            routes: The rows'.
        """
        starts = [0, *routes.ends.tolist()]
        own = [torch.linalg.vector_norm(x[a:b], dim=0, dtype=torch.float32) for a, b in itertools.pairwise(starts)]
        other = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        energy = (torch.stack(own) * other).square()
        self._energy = energy if self._energy is None else self._energy + energy

    def write(self, weight: Tensor | None, turned: Tensor | None) -> None:
        """As a projection's, but turned is memory for [E, inputs, N]."""
        (stack,), count = self._parts(), self.experts
        fp8.stack_from_nf4(
            stack.packed, stack.absmax, self.factors, shape=(self.outputs // count, self.inputs), nested=stack.nested,
            out=None if weight is None else weight.view(count, -1, weight.shape[1]),
            turned=None if turned is None else turned.view(count, self.inputs, -1), again=self.again,
        )  # fmt: skip


class Stack:
    """The matrices of all experts at work, and their adapters: as :class:`Site`, with a matrix for each expert.

    They are written as they are stored, each turned or not, so that nothing has to be transposed.

    Args:
        stack: The expert stack.
        dtype: Compute dtype.
        device: Where it computes.
        scratch: Buffers for weights that aren't kept.
    """

    def __init__(self, stack: ExpertStack, dtype: torch.dtype, device: torch.device, scratch: Scratch) -> None:
        self.stack, self.dtype, self.device = stack, dtype, device
        self.inputs, self.outputs, self.experts = stack.in_features, stack.out_features, stack.experts
        self.rank = 0 if stack.adapter is None else stack.adapter.rank // stack.experts
        used = self.rank + (stack.bias is not None)
        self.extra = -(-used // ALIGNMENT) * ALIGNMENT
        # A packed tensor may be turned itself: what counts is how its bytes lie.
        self._turned = stack.transposed != getattr(stack.weight, "turned", False)
        self.eighths = False
        """Whether it is multiplied in FP8."""
        self.channels = 0
        """Then, of its inputs, those whose losses the product takes in."""
        self._recomputed = False
        self._fp8: Fp8Stack | None = None
        self._scratch = scratch
        self._kept: Tensor | None = None
        self._tail = torch.zeros(1, self.extra, dtype=dtype, device=device)  # the extra columns without an adapter
        self._tail[:, : int(stack.bias is not None)] = 1

    @property
    def fits_fp8(self) -> bool:
        """Whether it has a form that is multiplied in FP8, however it is stored."""
        return not self.extra and not self._turned and self.dtype == torch.bfloat16

    @property
    def is_nf4(self) -> bool:
        """Whether it is stored in NF4, each matrix as :meth:`slimtune.engine.fp8.Fp8Weight.takes` has it."""
        packed = getattr(self.stack.weight, "format", None) == "nf4"
        return packed and Fp8Weight.takes([self._nf4()._replace(shape=(self.outputs, self.inputs))])

    def use_fp8(self, switch: Fp8 | None, channels: int, *, recomputed: bool) -> None:
        """Multiply in FP8 from now on while the switch is on; without one, take the sizes.

        Args:
            switch: The model's.
            channels: C.
            recomputed: The backward may compute its products again, and multiplies with the matrices too.
        """
        self.eighths, self.channels, self._recomputed = True, channels, recomputed
        if switch is not None:
            # Asked for anew at each use: a streamed layer's lies now here, now there.
            self._fp8 = Fp8Stack(self._nf4, self.experts, self.inputs, channels, switch)
            switch.weights[self.name] = self._fp8

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.stack.name

    @property
    def in_fp8(self) -> Fp8Stack | None:
        """The weight that is multiplied in FP8 just now; None: in the compute dtype."""
        return self._fp8 if self._fp8 is not None and self._fp8.switch.on else None

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """Of the buffer that it is made anew in; in FP8 flat, with room for the matrices beside their transposes where
        the backward multiplies with both."""
        columns = self.inputs + self.extra
        if self.eighths:
            return (self.experts * self.outputs * (columns + self.channels * self._recomputed),)
        return (self.experts, *((columns, self.outputs) if self._turned else (self.outputs, columns)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B, if it has an adapter."""
        adapter = self.stack.adapter
        return [] if adapter is None else [adapter.a, adapter.b]

    @property
    def wide(self) -> torch.dtype:
        """What gradients are summed in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def a(self) -> Tensor:
        """[E, r, inputs], the adapter's own memory."""
        assert self.stack.adapter is not None
        return self.stack.adapter.a.detach().view(self.experts, self.rank, self.inputs)

    @property
    def scaling(self) -> float:
        """The adapter's."""
        assert self.stack.adapter is not None
        return self.stack.adapter.scaling

    def sink(self, a: Tensor, b: Tensor) -> Gradients:
        """Where gradients are added, as [E, r, inputs] and [E, outputs, r], over memory laid out as A and B are."""
        return Gradients(a.view(self.experts, self.rank, self.inputs), [self._by_expert(b)])

    def fresh_sink(self) -> Gradients:
        """Zeros on its device, to add gradients to."""
        a, b = (torch.zeros(x.shape, dtype=self.wide, device=self.device) for x in self.parameters)
        return self.sink(a, b)

    def gradients(self, sink: Gradients) -> list[Tensor]:
        """What a sink holds for each of :attr:`parameters`."""
        return [x.reshape(p.shape) for x, p in zip((sink.a, sink.b[0].permute(1, 2, 0)), self.parameters, strict=True)]

    def _by_expert(self, b: Tensor) -> Tensor:
        """[outputs, r E] as [E, outputs, r], the same memory."""
        return b.view(self.outputs, self.rank, self.experts).permute(2, 0, 1)

    @property
    def weights(self) -> list[Any]:
        """The model's own parameter."""
        return [self.stack.weight]

    @property
    def shared(self) -> Tensor | None:
        """The model's own weight, where that serves as it is."""
        weight = self.stack.weight
        plain = self.extra == 0 and not hasattr(weight, "parts") and weight.dtype == self.dtype
        return self._upright(weight.detach()) if plain else None

    @property
    def bias_column(self) -> int | None:
        """Which column of the weight, and of the input and its gradient, is the bias'; None without one."""
        return None if self.stack.bias is None else self.inputs + self.rank

    def _upright(self, stored: Tensor) -> Tensor:
        """[E, outputs, columns] of what lies as it is stored, the same memory."""
        return stored.transpose(1, 2) if self._turned else stored

    @property
    def kept_bytes(self) -> int:
        """Bytes that :meth:`keep` takes, in FP8 without the transposes."""
        if self.eighths:
            return self.experts * self.outputs * (self.inputs + 2 * self.channels)
        return self.buffer_bytes

    @property
    def turned_bytes(self) -> int:
        """Bytes of the transposes that the backward multiplies with in FP8."""
        return self.experts * self.outputs * self.inputs if self.eighths else 0

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer that it is made anew in."""
        return 0 if self.shared is not None else math.prod(self.buffer_shape) * self.dtype.itemsize

    @property
    def spared_bytes(self) -> int:
        """What keeping it takes less in FP8 than in the compute dtype, without the transposes; its scales counted."""
        if not self.eighths:
            return 0
        scales = 4 * (self.experts * (self.outputs + self.channels) + self.inputs)
        return self.experts * self.outputs * self.inputs * self.dtype.itemsize - self.kept_bytes - scales

    def keep(self, *, turned: bool = False) -> None:
        """Hold the weights from now on, as they are multiplied, instead of making them anew at each use.

        Args:
            turned: In FP8, their transposes too.
        """
        if self._fp8 is not None and self._fp8.kept is None:
            self._fp8.keep(0, turned=turned)
        elif self._fp8 is None and self._kept is None and self.shared is None:
            self._kept = torch.zeros(self.buffer_shape, dtype=self.dtype, device=self.device)
            self._fill_frozen(self._kept)

    def refresh(self) -> None:
        """Take over new values of the adapter; only a kept weight holds any."""
        if self._kept is not None:
            self._fill_adapter(self._kept)

    def weight(self) -> Tensor:
        """[W | sB | bias | 0] of shape [E, outputs, inputs + extra], one of its last two dimensions contiguous.

        Valid until another stack's of its shape is asked for.
        """
        if self.shared is not None:
            return self.shared
        if self._kept is not None:
            return self._upright(self._kept)
        buffer = self._buffer()
        if self.eighths:
            shape = self.experts, self.outputs, self.inputs
            buffer = buffer[: math.prod(shape)].view(shape)
        self._fill_frozen(buffer)
        self._fill_adapter(buffer)
        return self._upright(buffer)

    def operands(self, *, upright: bool, turned: bool) -> tuple[Tensor | None, Tensor | None]:
        """W8 [E, outputs, inputs + 2 C] and its transposes [E, inputs, outputs], as :meth:`weight` is valid.

        Args:
            upright: The former is asked for.
            turned: The latter are.
        """
        eight = self._fp8
        assert eight is not None
        # Behind the matrices, which may still be read.
        first = self.kept_bytes // self.dtype.itemsize if upright else 0
        own = eight.operand(self._buffer, turned=False).view(self.experts, self.outputs, -1) if upright else None
        across = eight.operand(lambda: self._buffer()[first:], turned=True) if turned else None
        return own, None if across is None else across.view(self.experts, self.inputs, -1)

    def _buffer(self) -> Tensor:
        return self._scratch.get(self.buffer_shape, self.dtype, self.device)

    def products(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`slimtune.engine.weights.Site.products`, of as many rows of each expert."""
        rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        ends = rows.view(self.experts, -1)[:, -1] + 1
        routes = Routes(rows, rows[:, None], ends, (rows // ends[0])[:, None])
        if (eight := self.in_fp8) is None:
            weight = self.weight()[:, :, : self.inputs]
            return grouped.grouped_forward(x, weight, routes.ends), grouped.grouped_backward(dy, weight, routes.ends)
        own, _ = self.operands(upright=True, turned=False)
        assert own is not None
        x8 = fp8.quantize(x, routes=routes, again=eight.again)
        y = fp8.grouped_product(*x8, own, eight.factors, routes.ends)
        _, across = self.operands(upright=False, turned=True)
        assert across is not None
        dy8 = fp8.quantize(dy, routes=routes, factors=eight.factors)
        return y, fp8.grouped_product(*dy8, across, eight.ones.expand(self.experts, -1), routes.ends)

    def weigh(self, x: Tensor, weight: Tensor, routes: Routes) -> None:
        """Where channels are being chosen, tell what is multiplied.

        Args:
            x: [R, inputs + extra].
            weight: [E, outputs, inputs + extra].
            routes: The rows'.
        """
        if self._fp8 is not None and self._fp8.switch.weighing:
            self._fp8.weigh_experts(x, weight, routes)  # there are no extra columns

    def _fill_frozen(self, buffer: Tensor) -> None:
        self._write(buffer[:, : self.inputs] if self._turned else buffer[:, :, : self.inputs])
        bias = self.stack.bias
        if bias is not None:
            self._upright(buffer)[:, :, self.inputs + self.rank] = bias.detach()

    def _write(self, out: Tensor) -> None:
        """The frozen matrices, as they are stored."""
        weight = self.stack.weight
        parts = getattr(weight, "parts", None)
        if parts is None:
            out.copy_(weight.detach())
            return
        if weight.format == "mxfp4":
            mxfp4.dequantize_stack(parts["blocks"], parts["exponents"], dtype=self.dtype, out=out)
            return
        shape, stored = (out.shape[1], out.shape[2]), self._nf4()
        nf4.dequantize_stack(
            stored.packed, stored.absmax, shape=shape, dtype=self.dtype, nested=stored.nested, out=out
        )  # fmt: skip

    def _nf4(self) -> Nf4Weight:
        """The stack as it is stored in NF4: matrices one below the other."""
        parts, nested = self.stack.weight.parts, None
        if "scale" in parts:
            nested = NestedScales(parts["scale"], self._code, parts["offset"], _NESTED_BLOCK)
        shape = (self.experts * self.outputs, self.inputs)
        return Nf4Weight(parts["codes"], parts["absmax"], shape, nested, _NF4_BLOCK)

    def _fill_adapter(self, buffer: Tensor) -> None:
        adapter = self.stack.adapter
        if adapter is not None:
            columns = self._upright(buffer)[:, :, self.inputs : self.inputs + self.rank]
            torch.mul(self._by_expert(adapter.b.detach()), adapter.scaling, out=columns)

    def fill_extra(self, x: Tensor, routes: Routes) -> None:
        """Compute the extra columns of an input buffer [R, inputs + extra], its first columns written."""
        first, extra = x[:, : self.inputs], x[:, self.inputs :]
        if self.rank:
            grouped_lora.expert_down(first, self.a, routes, out=extra, ones=self.stack.bias is not None)
        elif self.extra:
            extra.copy_(self._tail)

    @cached_property
    def _code(self) -> Tensor:
        return dynamic_map(signed=True).to(self.device)
