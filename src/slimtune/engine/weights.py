"""The frozen weights of a projection, its adapters beside them in the same matrix.

The frozen product and the adapter's up-projection are one matrix product. With u = dropout(x) Aᵀ in extra columns of
the input, and scaling x B in extra columns of the weight,

    y = [x | u | 1 | 0] · [W | sB | bias | 0]ᵀ          dy · [W | sB | …] = [dx | du | …]

so that the adapter and the bias cost no pass of their own over y or dy, and are summed in float32 inside the product.
In FP8 they do: :mod:`slimtune.engine.fp8`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.engine.fp8 import Fp8, Fp8Weight, Rows, channels
from slimtune.engine.kernels import fp8, lora
from slimtune.engine.kernels.formats import Nf4Weight
from slimtune.engine.stored import nf4_weight, write_weight
from slimtune.engine.structure import Adapter, Projection

__all__ = ["ALIGNMENT", "Gradients", "Scratch", "Site"]

_MASKS = 3  # adapters on one input that lora's kernels draw dropout masks for at once
ALIGNMENT = 8
"""Columns: 16 bytes of a 16-bit dtype, what a tensor-core product wants its rows to start on."""


class Scratch:
    """Buffers that one layer after the other uses; one for each shape."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def get(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of this shape, with whatever was left in it; zeros at first."""
        key = (shape, dtype, device)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=dtype, device=device)
        return self._buffers[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class Gradients:
    """Where a projection's adapter gradients are added: float32 ``a`` like :attr:`Site.a`, ``b`` for each adapter.

    Args:
        a: [groups x rank, inputs].
        b: For each adapter [out_features, its rank].
        whole_b: All of ``b`` as one [outputs, rank], where they lie side by side.
    """

    def __init__(self, a: Tensor, b: Sequence[Tensor], whole_b: Tensor | None = None) -> None:
        self.a, self.b, self.whole_b = a, tuple(b), whole_b


class Site:
    """One projection at work: its weight in the compute dtype, and its adapters.

    Args:
        projection: The linear layers.
        dtype: Compute dtype.
        device: Where it computes.
        stream: Number that no other site of the model has; it tells the sites' dropout masks apart.
        scratch: Buffers for weights that aren't kept.
    """

    def __init__(
        self, projection: Projection, dtype: torch.dtype, device: torch.device, stream: int, scratch: Scratch
    ) -> None:
        self.projection, self.dtype, self.device, self.stream = projection, dtype, device, stream
        self.groups = len(projection.adapters)
        self.rank = max((adapter.rank for adapter in projection.adapters), default=0)
        used = self.groups * self.rank + projection.has_bias
        self.extra = -(-used // ALIGNMENT) * ALIGNMENT
        self.inputs, self.outputs = projection.in_features, projection.out_features
        self.dropout = projection.adapters[0].dropout if projection.adapters else 0.0
        self._scratch = scratch
        self._kept: Tensor | None = None
        self.a: Tensor | None = None
        self._tail = torch.zeros(1, self.extra, dtype=dtype, device=device)  # the extra columns without adapters
        self._tail[:, : int(projection.has_bias)] = 1
        self.channels = 0
        """Of its inputs those whose losses the product in FP8 takes in; 0: it is in 16 bits."""
        self._fp8: Fp8Weight | None = None

    def use_fp8(self, switch: Fp8 | None) -> None:
        """Multiply in FP8 from now on while the switch is on, if this weight can be; without one, take the sizes."""
        if switch is not None:
            found = self._nf4_weights()
            if self.dtype != torch.bfloat16 or len(found) < len(self.projection.linears) or not Fp8Weight.takes(found):
                return
        self.channels = channels(self.inputs, self.outputs)
        if switch is not None:
            # Asked for anew at each use: a streamed layer's lies now here, now there.
            self._fp8 = Fp8Weight(self._nf4_weights, self.inputs, self.channels, switch)
            switch.weights[self.name] = self._fp8

    @property
    def name(self) -> str:
        """Of its linear layers."""
        return ", ".join(linear.name for linear in self.projection.linears)

    def _nf4_weights(self) -> list[Nf4Weight]:
        """Those of its linear layers that are NF4."""
        parts = (nf4_weight(linear) for linear in self.projection.linears)
        return [part for part in parts if part is not None]

    @property
    def in_fp8(self) -> Fp8Weight | None:
        """The weight that is multiplied in FP8 just now; None: in the compute dtype."""
        return self._fp8 if self._fp8 is not None and self._fp8.switch.on else None

    @property
    def columns(self) -> int:
        """Of its weight in the compute dtype: inputs and extra ones."""
        return self.inputs + self.extra

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """Of the buffer that it is made anew in: flat where FP8's numbers come into it, which leave no zeros."""
        return (self.outputs * self.columns,) if self.channels else (self.outputs, self.columns)

    @property
    def fp8_columns(self) -> int:
        """Bytes of one row of its product's gradient in FP8, where that is what the backward multiplies."""
        return self.outputs if self.channels else 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The A, then the B: as they lie in the flat tensor, so that the A stack without a copy."""
        adapters = self.projection.adapters
        return [adapter.a for adapter in adapters] + [adapter.b for adapter in adapters]

    @property
    def wide(self) -> torch.dtype:
        """What gradients are summed in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def fresh_sink(self) -> Gradients:
        """Zeros on its device, to add gradients to."""
        adapters = self.projection.adapters
        a = torch.zeros(self.groups * self.rank, self.inputs, dtype=self.wide, device=self.device)
        return Gradients(a, [torch.zeros(x.b.shape, dtype=self.wide, device=self.device) for x in adapters])

    def gradients(self, sink: Gradients) -> list[Tensor]:
        """What a sink holds for each of :attr:`parameters`."""
        stacked = zip(torch.split(sink.a, self.rank), self.projection.adapters, strict=True)
        return [*(da[: adapter.rank] for da, adapter in stacked), *sink.b]

    # -- the weight ---------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> list[Any]:
        """The model's own parameters that it is made of."""
        return [linear.base.weight for linear in self.projection.linears]

    @property
    def shared(self) -> Tensor | None:
        """The model's own weight, where that serves as it is: one dense linear layer without adapter or bias."""
        linear = self.projection.linears[0]
        weight = linear.base.weight
        plain = self.extra == 0 and len(self.projection.linears) == 1 and not hasattr(weight, "quant_state")
        return weight.detach() if plain and isinstance(weight, Tensor) and weight.dtype == self.dtype else None

    @property
    def kept_bytes(self) -> int:
        """Bytes that :meth:`keep` takes, in FP8 without the transpose."""
        if self.channels:
            return self.outputs * (self.inputs + 2 * self.channels + self.extra * self.dtype.itemsize)
        return self.buffer_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer that it is made anew in, and of the weight in the compute dtype."""
        return 0 if self.shared is not None else self.outputs * self.columns * self.dtype.itemsize

    def keep(self, *, turned: bool = False) -> None:
        """Hold the weight from now on, as it is multiplied, instead of making it anew at each use.

        Args:
            turned: In FP8, its transpose too.
        """
        if self._kept is not None or self.shared is not None:
            return
        if self._fp8 is None:
            self._kept = torch.zeros(self.outputs, self.columns, dtype=self.dtype, device=self.device)
            self._fill_frozen(self._kept)
        else:
            self._kept = self._fp8.keep(self.extra, turned=turned)
            self._fill_bias(self._kept)

    def refresh(self) -> None:
        """Take over new values of the adapters; only a kept weight holds any."""
        if self._kept is not None:
            self._fill_adapters(self._kept[:, self.inputs :] if self._fp8 is None else self._kept)

    def weight(self) -> Tensor:
        """[W | sB | bias | 0] of shape [outputs, inputs + extra]; valid until another site's is asked for."""
        if self.shared is not None:
            return self.shared
        if self._kept is not None and self._fp8 is None:
            return self._kept
        buffer = self._buffer().view(self.outputs, self.columns)
        if self._fp8 is not None:  # it has held FP8's numbers, and some of the columns are written by nobody
            buffer[:, self.inputs :].zero_()
        self._fill_frozen(buffer)
        self._fill_adapters(buffer[:, self.inputs :])
        return buffer

    def _weight_in_fp8(self, weight: Fp8Weight, *, turned: bool) -> tuple[Tensor, Tensor]:
        """W8 [outputs, inputs + 2 C] or its transpose, and [sB | bias | 0]; valid as :meth:`weight` is."""
        operand, beside = weight.operand(self._buffer, turned=turned), self._kept
        if beside is None:
            beside = self._buffer()[self.outputs * self.inputs :].view(self.outputs, self.extra)
            beside.zero_()
            self._fill_bias(beside)
            self._fill_adapters(beside)
        return operand, beside

    def _buffer(self) -> Tensor:
        return self._scratch.get(self.buffer_shape, self.dtype, self.device)

    def _fill_frozen(self, buffer: Tensor) -> None:
        row = 0
        for linear in self.projection.linears:
            write_weight(linear, buffer[row : row + linear.out_features, : self.inputs])
            row += linear.out_features
        self._fill_bias(buffer[:, self.inputs :])

    def _fill_bias(self, beside: Tensor) -> None:
        """Write the bias' column of the extra ones [outputs, extra]."""
        if not self.projection.has_bias:
            return
        column, row = beside[:, self.groups * self.rank], 0
        for linear in self.projection.linears:
            rows = column[row : row + linear.out_features]
            rows.zero_() if linear.bias is None else rows.copy_(linear.bias)
            row += linear.out_features

    def _fill_adapters(self, beside: Tensor) -> None:
        """Write every adapter's sB into the extra columns [outputs, extra]."""
        for index, (adapter, rows) in enumerate(self._adapter_outputs()):
            start = index * self.rank
            torch.mul(adapter.b.detach(), adapter.scaling, out=beside[rows, start : start + adapter.rank])

    # -- the input ----------------------------------------------------------------------------------------------------

    def input_buffer(self, rows: int) -> Tensor:
        """An uninitialised [rows, inputs + extra]; the caller writes its first ``inputs`` columns."""
        return torch.empty(rows, self.inputs + self.extra, dtype=self.dtype, device=self.device)

    def stack_adapters(self) -> Tensor | None:
        """The adapters' A one below the other, [groups x rank, inputs]; lower ranks are filled up with zero rows."""
        matrices = [adapter.a.detach() for adapter in self.projection.adapters]
        if not matrices:
            return None
        padded = [torch.nn.functional.pad(a, (0, 0, 0, self.rank - a.shape[0])) for a in matrices]
        return padded[0] if len(padded) == 1 else torch.cat(padded)

    def buffer_of(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """An input buffer that holds x [rows, inputs], extra columns and all."""
        if not self.extra:
            return x
        buffer = self.input_buffer(x.shape[0])
        self.fill_extra(buffer, seed, 0, source=x)
        return buffer

    def fill_extra(self, x: Tensor, seed: Tensor | None, chunk: int, *, source: Tensor | None = None) -> None:
        """Compute the extra columns of an input buffer.

        Args:
            x: [rows, inputs + extra], its first columns written, unless there is a ``source``.
            seed: The micro-batch's dropout; None: no dropout.
            chunk: Which part of the micro-batch x is; each has masks of its own.
            source: [rows, inputs] to copy into the first columns on the way.
        """
        first, extra = x[:, : self.inputs], x[:, self.inputs :]
        if self.groups and self.a is not None:
            for rows, options in self._dropout(seed, chunk):
                last = rows.stop == len(self.a)
                out = extra[:, rows.start :] if last else extra[:, rows]  # columns after the last become zero
                copy = None if source is None or rows.start else first
                lora.lora_down(
                    first if copy is None or source is None else source, self.a[rows], out=out, copy=copy,
                    ones=last and self.projection.has_bias, **options,
                )  # fmt: skip
            return
        if source is not None:
            first.copy_(source)
        if self.extra:
            extra.copy_(self._tail)

    def _dropout(self, seed: Tensor | None, chunk: int) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Rows of A that one call of lora's kernels takes, and its options: all, or as many as it draws masks for."""
        dropout = 0.0 if seed is None else self.dropout
        most = _MASKS if dropout else self.groups
        for number, first in enumerate(range(0, self.groups, most)):
            groups = min(most, self.groups - first)
            stream = self.stream + (chunk << 16) + (number << 28)
            options = {"groups": groups, "dropout": dropout, "seed": seed, "stream": stream}
            yield slice(first * self.rank, (first + groups) * self.rank), options

    # -- the product --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor | None, *, out: Tensor | None = None, eighths: Rows | None = None) -> Tensor:
        """y [rows, outputs] of an input buffer [rows, inputs + extra].

        Args:
            x: The buffer; None only beside ``eighths``, where there are no extra columns.
            out: [rows, outputs] that takes y.
            eighths: x's first columns in FP8 and what comes behind them, where they are made already.
        """
        eight = self.in_fp8
        if eight is None:
            assert x is not None
            own = self.weight()
            if self._fp8 is not None and self._fp8.switch.weighing:
                self._fp8.weigh(x[:, : self.inputs], own[:, : self.inputs])
            return torch.mm(x, own.t()) if out is None else torch.mm(x, own.t(), out=out)
        weight, beside = self._weight_in_fp8(eight, turned=False)
        if eighths is None:
            assert x is not None
            eighths = fp8.quantize(x[:, : self.inputs], again=eight.again)
        y = fp8.product(*eighths, weight, eight.scales, out=out)
        if self.extra:
            assert x is not None
            y.addmm_(x[:, self.inputs :], beside.t())
        return y

    def _backward(
        self, dy: Tensor, eighths: Rows | None, *, need_dx: bool, need_du: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx [rows, inputs] and du [rows, groups x rank] of dy [rows, outputs]."""
        eight, columns = self.in_fp8, self.groups * self.rank
        if eight is None:
            # The unused columns too: attention's kernels read dx by 16 bytes, so its rows must begin at multiples of
            # them.
            first, last = 0 if need_dx else self.inputs, None if need_du else self.inputs
            product = torch.mm(dy, self.weight()[:, first:last])
            du = product[:, self.inputs - first :][:, :columns] if need_du else None
            return product[:, : self.inputs] if need_dx else None, du
        turned, beside = self._weight_in_fp8(eight, turned=True)
        dx = None
        if need_dx:
            dx = fp8.product(*(eighths or eight.switch.quantize(dy, eight.scales)), turned, eight.ones)
        return dx, torch.mm(dy, beside[:, :columns]) if need_du else None

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        seed: Tensor | None,
        gradients: Gradients | None,
        *,
        chunk: int = 0,
        need_dx: bool = True,
        out: Tensor | None = None,
        eighths: Rows | None = None,
    ) -> Tensor | None:
        """dx [rows, inputs], and the adapters' gradients added to ``gradients``.

        Args:
            dy: [rows, outputs].
            x: The forward's input buffer, extra columns and all; only needed where there are adapters.
            seed: The forward's.
            gradients: The sums to add to; None where there are no adapters.
            chunk: The forward's.
            need_dx: Without it only the adapters' gradients are computed, and None is returned.
            out: [rows, inputs] that may take dx, where there are no extra columns.
            eighths: dy times the weight's scales in FP8, where that is made already; without adapters dy isn't read
                then.
        """
        if not self.groups:
            if not need_dx:
                return None
            if out is not None and not self.extra and self.in_fp8 is None:
                return torch.mm(dy, self.weight(), out=out)
            return self._backward(dy, eighths, need_dx=True, need_du=False)[0]
        if x is None or gradients is None or self.a is None:
            raise ValueError("a projection with adapters needs its input and a place for its gradients")
        dx, du = self._backward(dy, eighths, need_dx=need_dx, need_du=True)
        assert du is not None
        self._b_backward(dy, x[:, self.inputs : self.inputs + self.groups * self.rank], gradients)
        for rows, options in self._dropout(seed, chunk):
            lora.lora_down_backward_(
                du[:, rows], x[:, : self.inputs], self.a[rows], da=gradients.a[rows], dx=dx, **options
            )
        return dx

    def products(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """x's and dy's products with the frozen weight alone, [rows, outputs] and [rows, inputs]: no adapter, no bias.

        Args:
            x: [rows, inputs].
            dy: [rows, outputs].
        """
        self.refresh()
        y = self.forward(torch.nn.functional.pad(x, (0, self.extra))).clone()
        dx, _ = self._backward(dy, None, need_dx=True, need_du=False)
        assert dx is not None
        return y, dx

    def _b_backward(self, dy: Tensor, u: Tensor, gradients: Gradients) -> None:
        adapters = self.projection.adapters
        if gradients.whole_b is not None:
            outputs = [linear.out_features for linear in self.projection.linears]
            lora.lora_up_backward_(dy, u, adapters[0].scaling, db=gradients.whole_b, outputs=outputs)
            return
        for index, (adapter, rows) in enumerate(self._adapter_outputs()):
            mine = u[:, index * self.rank : index * self.rank + adapter.rank]
            lora.lora_up_backward_(dy[:, rows], mine, adapter.scaling, db=gradients.b[index])

    def _adapter_outputs(self) -> Iterator[tuple[Adapter, slice]]:
        """Each adapter and the columns of y that are its layer's."""
        start = 0
        for linear in self.projection.linears:
            if linear.adapter is not None:
                yield linear.adapter, slice(start, start + linear.out_features)
            start += linear.out_features
