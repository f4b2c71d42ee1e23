"""Frozen weights that lie in 4 bits and become numbers where they are used.

bitsandbytes has 4-bit linear layers. What is no ``nn.Linear`` it leaves in 16 bits: the experts of a mixture, which
Transformers holds as one parameter [experts, rows, columns] for all of them, and linear layers with a forward of their
own. :class:`PackedTensor` is a parameter for these. To everybody else it is a tensor of its logical shape and dtype; an
operation that needs numbers gets them, computed for that operation alone. What autograd keeps of it for the backward is
the packed tensor, so a layer's 16-bit weights live no longer than one product, with gradient checkpointing or without.
Taking an expert, or turning the matrix around, stays packed: a loop over experts unpacks one at a time.

Two formats: NF4 as bitsandbytes packs each matrix (QLoRA, arXiv:2305.14314), and MXFP4 as gpt-oss is published in (OCP
Microscaling Formats 1.0, section 5.2). The packed bytes are never written to.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from slimtune.engine.kernels import reference_mxfp4 as mxfp4
from slimtune.engine.kernels.formats import MXFP4_BLOCK

__all__ = ["NF4_BLOCK", "Mxfp4Tensor", "Nf4Tensor", "PackedTensor", "bulk_bytes", "misreads_partial_blocks", "unpack_"]

NF4_BLOCK = 64
"""Weights to one scale (QLoRA, section 3)."""
_SCALE_BLOCK = 256
"""Scales to one scale of scales, where these are quantised again."""

aten = torch.ops.aten


def bulk_bytes(shape: Sequence[int], *, double_quant: bool, mxfp4: bool = False) -> tuple[int, int]:
    """Bytes of the two tensors that hold most of a weight of this shape, NF4 or MXFP4: codes, and scales of blocks."""
    matrices = shape[0] if len(shape) == 3 else 1
    weights = math.prod(shape) // matrices
    if mxfp4:
        return matrices * weights // 2, matrices * weights // MXFP4_BLOCK
    blocks = math.ceil(weights / NF4_BLOCK)
    return matrices * blocks * NF4_BLOCK // 2, matrices * blocks * (1 if double_quant else 4)


class PackedTensor(Tensor):
    """A matrix [rows, columns], or a stack of them [stack, rows, columns], in packed parts; frozen.

    Attributes:
        parts: The packed tensors, by name; the first dimension of each counts the stack (1 for a matrix).
        turned: The matrices are read transposed: what is packed is [..., columns, rows].
    """

    format: ClassVar[str]
    """nf4 or mxfp4."""
    parts: dict[str, Tensor]
    turned: bool

    @staticmethod
    def __new__(
        cls, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, *, turned: bool = False
    ) -> Self:
        """Make one of its parts; ``shape`` is that of the packed matrices, before they are turned."""
        logical = (*shape[:-2], shape[-1], shape[-2]) if turned else tuple(shape)
        strides = torch.empty(tuple(shape), device="meta").stride()
        if turned:
            strides = (*strides[:-2], strides[-1], strides[-2])
        device = next(iter(parts.values())).device
        # torch's own way to make a tensor without storage of its own. A view of a parameter is no inference tensor, in
        # inference mode either.
        with torch.inference_mode(False):
            made: Self = Tensor._make_wrapper_subclass(cls, logical, strides=strides, dtype=dtype, device=device)
        made.parts, made.turned = dict(parts), turned
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """Detached. What it is set to brings its parts: ``Module.to`` moves a parameter to a GPU so."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, PackedTensor):
            raise TypeError(f"a packed weight's data can't be a {type(other).__name__}")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        # Whoever holds the parts' dictionary, as the store of a layer's weights does, holds what is there now.
        moved = dict(other.parts)
        self.parts.clear()
        self.parts.update(moved)
        self.turned = other.turned

    @abstractmethod
    def unpack(self) -> Tensor:
        """The numbers, in the logical shape and dtype."""

    @property
    def packed_bytes(self) -> int:
        """Bytes that it takes, scales included."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def packed_shape(self) -> torch.Size:
        """The shape before it was turned."""
        shape = self.shape
        return torch.Size((*shape[:-2], shape[-1], shape[-2])) if self.turned else shape

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self._with({name: part.clone() for name, part in self.parts.items()})
        return torch.nn.Parameter(copied, requires_grad=False) if isinstance(self, torch.nn.Parameter) else copied

    def _with(
        self,
        parts: Mapping[str, Tensor] | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        turned: bool | None = None,
    ) -> Self:
        return type(self)(
            self.parts if parts is None else parts,
            self.packed_shape if shape is None else shape,
            dtype or self.dtype,
            turned=self.turned if turned is None else turned,
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stay packed where that is possible, refuse to be written to, and else compute with the numbers."""
        kwargs = kwargs or {}
        stays = _STAYS_PACKED.get(func)
        if stays is not None:
            result = stays(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, PackedTensor):
                raise TypeError(f"{func} would write to a packed weight, which is frozen")
        unpacked: Callable[[PackedTensor], Tensor] = lambda packed: packed.unpack()  # noqa: E731 - tree_map_only takes one
        return func(*pytree.tree_map_only(PackedTensor, unpacked, args), **kwargs)


def _turn(x: PackedTensor, dim0: int = -2, dim1: int = -1) -> Any:
    if {dim0 % x.dim(), dim1 % x.dim()} != {x.dim() - 2, x.dim() - 1}:
        return NotImplemented
    return x._with(turned=not x.turned)


def _permute(x: PackedTensor, dims: Sequence[int]) -> Any:
    order = [dim % x.dim() for dim in dims]
    last = x.dim() - 1
    return _turn(x) if order == [*range(last - 1), last, last - 1] else NotImplemented


def _take(x: PackedTensor, dim: int, index: int) -> Any:
    if dim % x.dim() != 0 or x.dim() != 3:
        return NotImplemented
    at = int(index) % x.shape[0]
    parts = {name: part[at : at + 1] for name, part in x.parts.items()}
    return x._with(parts, shape=x.packed_shape[1:])


def _gather(x: PackedTensor, indices: Sequence[Tensor | None]) -> Any:
    (index, *rest) = indices
    if rest or x.dim() != 3 or index is None or index.dtype == torch.bool or index.dim() > 1:
        return NotImplemented
    if index.dim() == 0:
        return _take(x, 0, int(index))
    parts = {name: part[index] for name, part in x.parts.items()}
    return x._with(parts, shape=(index.shape[0], *x.packed_shape[1:]))


def _move(x: PackedTensor, **options: Any) -> Any:
    dtype, device = options.get("dtype"), options.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    blocking = {"non_blocking": options.get("non_blocking", False)}
    moved = {name: part.to(device=device, **blocking) for name, part in x.parts.items()} if device else None
    return x._with(moved, dtype=dtype)


def _set_to_itself(x: PackedTensor, source: Tensor) -> Any:
    """torch's parametrisations, which PEFT adapts expert stacks by, set a parameter to what it is already."""
    same = isinstance(source, PackedTensor) and all(source.parts[name] is part for name, part in x.parts.items())
    return x if same else NotImplemented


def _copy(x: PackedTensor, **_: Any) -> PackedTensor:
    return x._with({name: part.clone() for name, part in x.parts.items()})


_STAYS_PACKED: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda x: x._with(),
    aten.alias.default: lambda x: x._with(),
    aten.lift_fresh.default: lambda x: x._with(),
    aten.clone.default: _copy,
    aten._to_copy.default: _move,
    aten.t.default: _turn,
    aten.transpose.int: _turn,
    aten.permute.default: _permute,
    aten.select.int: _take,
    aten.index.Tensor: _gather,
    aten.set_.source_Tensor: _set_to_itself,
}


class Nf4Tensor(PackedTensor):
    """NF4, each matrix of a stack packed by itself: its bytes are those that bitsandbytes makes of that matrix alone.

    Parts, for n weights a matrix in b = ceil(n / 64) blocks: ``codes`` uint8 [stack, 32 b], the last block filled up
    with zeros; ``absmax`` float32 [stack, b], the blocks' scales. Double quantisation makes of the scales ``absmax``
    uint8 [stack, b], ``scale`` float32 [stack, ceil(b / 256)] and ``offset`` float32 [stack].
    """

    format = "nf4"

    @classmethod
    def quantize(cls, matrices: Tensor, *, double_quant: bool) -> Nf4Tensor:
        """Pack [rows, columns] or [stack, rows, columns]; one matrix at a time is read.

        Args:
            matrices: In 16 or 32 bits, on the device where it is to lie.
            double_quant: Quantise the scales too.
        """
        stack = matrices if matrices.dim() == 3 else matrices[None]
        made = [cls._quantize_one(matrix, double_quant=double_quant) for matrix in stack]
        parts = {name: torch.stack([one[name] for one in made]) for name in made[0]}
        return cls(parts, matrices.shape, matrices.dtype)

    @classmethod
    def stacked(cls, stacks: Sequence[Nf4Tensor]) -> Nf4Tensor:
        """Stacks of matrices of one shape as one stack; none of them is turned."""
        first = stacks[0]
        parts = {name: torch.cat([stack.parts[name] for stack in stacks]) for name in first.parts}
        return cls(parts, (sum(stack.shape[0] for stack in stacks), *first.shape[1:]), first.dtype)

    @staticmethod
    def _quantize_one(matrix: Tensor, *, double_quant: bool) -> dict[str, Tensor]:
        flat = matrix.detach().contiguous().reshape(-1)
        missing = -flat.shape[0] % NF4_BLOCK
        if missing:  # zeros don't change the last block's scale
            flat = torch.nn.functional.pad(flat, (0, missing))
        codes, state = quantize_4bit(
            flat.view(-1, NF4_BLOCK), blocksize=NF4_BLOCK, compress_statistics=double_quant, quant_type="nf4"
        )
        parts = {"codes": codes.reshape(-1), "absmax": state.absmax}
        if double_quant:
            parts |= {"scale": state.state2.absmax, "offset": state.offset}
        return parts

    def unpack(self) -> Tensor:  # noqa: D102 - the base says it
        absmax = self._scales().reshape(-1)
        # Rows of one block: bitsandbytes' kernel for some CPUs takes each row for a whole number of blocks.
        state = QuantState(
            absmax, torch.Size((absmax.shape[0], NF4_BLOCK)), blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype
        )
        shape = self.packed_shape
        codes = self.parts["codes"]
        values: Tensor = dequantize_4bit(codes.reshape(-1, 1), state).view(codes.shape[0], -1)
        numbers = values[:, : shape[-2] * shape[-1]].reshape(shape)
        return numbers.transpose(-1, -2) if self.turned else numbers

    def _scales(self) -> Tensor:
        """The blocks' scales, float32 [stack, blocks]."""
        codes = self.parts["absmax"]
        if "scale" not in self.parts:
            return codes
        scale, blocks, values = self.parts["scale"], codes.shape[1], _scale_values(codes.device)
        if blocks % _SCALE_BLOCK == 0:
            state = QuantState(scale.reshape(-1), code=values, blocksize=_SCALE_BLOCK, dtype=torch.float32)
            plain: Tensor = dequantize_blockwise(codes.reshape(-1), state).view(codes.shape)
        else:
            # A block of scales would reach into the next matrix's, so the same is computed here.
            plain = values[codes.int()] * scale.repeat_interleave(_SCALE_BLOCK, 1)[:, :blocks]
        return plain + self.parts["offset"].view(-1, 1)


@lru_cache
def _scale_values(device: torch.device) -> Tensor:
    """What the 8-bit codes of scales stand for, float32 [256] (8-bit optimizers, arXiv:2110.02861, section 2.1)."""
    values: Tensor = create_dynamic_map().to(device)
    return values


class Mxfp4Tensor(PackedTensor):
    """MXFP4: two E2M1 codes a byte, the lower first, and one exponent to 32 of them.

    Parts: ``blocks`` uint8 [stack, rows, columns / 2] and ``exponents`` uint8 [stack, rows, columns / 32], biased by
    127. Each weight is value x 2^exponent: exact in bfloat16 and float32.
    """

    format = "mxfp4"

    @classmethod
    def of_files(cls, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Mxfp4Tensor:
        """From tensors as gpt-oss is published: ``blocks`` [stack, rows, groups, 16], ``scales`` [stack, rows, groups].

        The parameter that Transformers holds is that stack turned: [stack, columns, rows].
        """
        stack, rows, groups, half = blocks.shape
        if half * 2 != MXFP4_BLOCK or scales.shape != blocks.shape[:-1]:
            raise ValueError(f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} are no MXFP4")
        parts = {"blocks": blocks.reshape(stack, rows, groups * half), "exponents": scales}
        return cls(parts, (stack, rows, groups * MXFP4_BLOCK), dtype, turned=True)

    def unpack(self) -> Tensor:  # noqa: D102 - the base says it
        # In plain torch, as answering may happen where Triton has no compiler.
        stack = mxfp4.dequantize_stack(self.parts["blocks"], self.parts["exponents"], dtype=self.dtype)
        numbers = stack.view(self.packed_shape)
        return numbers.transpose(-1, -2) if self.turned else numbers


def misreads_partial_blocks() -> bool:
    """Whether bitsandbytes, on this CPU, reads other numbers in rows of one and a half blocks than in rows of one.

    Its kernel for CPUs with AVX512 begins a new block at each row (0.50, ``cdequantize_blockwise_cpu_nf4``).
    """
    ramp = torch.linspace(-1.0, 1.0, 3 * NF4_BLOCK).view(3, NF4_BLOCK)
    packed, state = quantize_4bit(ramp, blocksize=NF4_BLOCK, quant_type="nf4")
    whole: Tensor = dequantize_4bit(packed, state).flatten()
    state.shape = torch.Size([2, 3 * NF4_BLOCK // 2])
    return not torch.equal(dequantize_4bit(packed, state).flatten(), whole)


def unpack_(model: torch.nn.Module) -> None:
    """Put the numbers in the place of every packed weight of a model: for answering, where there is room for them."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, PackedTensor):
                setattr(module, name, torch.nn.Parameter(parameter.unpack(), requires_grad=False))
