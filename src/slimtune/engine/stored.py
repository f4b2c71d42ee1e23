"""Frozen weights as they are stored: where their bytes are held, and written out in a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimtune.engine.kernels import nf4
from slimtune.engine.kernels.formats import NestedScales, Nf4Weight
from slimtune.engine.structure import Linear

__all__ = [
    "Place",
    "dense",
    "nf4_weight",
    "places_of",
    "unpack_for_training",
    "views_over",
    "whole_bytes",
    "write_weight",
]

_ADDRESSES = 256  # bytes: tensors in one memory start at multiples, as torch's allocator lets them
_BULK = ("codes", "absmax", "blocks", "exponents")  # of a packed weight's parts; the others are a thousandth of these


class Place(NamedTuple):
    """Where a frozen tensor is held: an attribute of an object, or an entry of a dictionary."""

    owner: Any
    name: str

    @property
    def tensor(self) -> Tensor:
        """What is held there."""
        held: Tensor = self.owner[self.name] if isinstance(self.owner, dict) else getattr(self.owner, self.name)
        return held

    def put(self, tensor: Tensor) -> None:
        """Hold another one there, of the same values."""
        if isinstance(self.owner, dict):
            self.owner[self.name] = tensor
        else:
            setattr(self.owner, self.name, tensor)


def whole_bytes(nbytes: int) -> int:
    """Bytes to where the next tensor may begin behind one of so many."""
    return -(-nbytes // _ADDRESSES) * _ADDRESSES


def views_over(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors as these over uint8 memory, one behind the other."""
    made, at = [], 0
    for tensor in like:
        made.append(memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += whole_bytes(tensor.nbytes)
    return made


def places_of(weight: Any) -> list[Place]:
    """Where a frozen weight's bytes are held, but for what is small of them."""
    parts, state = getattr(weight, "parts", None), getattr(weight, "quant_state", None)
    if parts is not None:
        return [Place(parts, name) for name in _BULK if name in parts]
    return [Place(weight, "data"), *([] if state is None else [Place(state, "absmax")])]


def dense(linear: Linear, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight [out_features, in_features] in a dtype, a copy."""
    unpack_for_training(linear)
    weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=linear.base.weight.device)
    write_weight(linear, weight)
    return weight


def nf4_weight(linear: Linear) -> Nf4Weight | None:
    """A linear layer's weight as it is stored; None where that isn't in 4 bits."""
    unpack_for_training(linear)  # the model may have been run since
    weight: Any = linear.base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return None
    nested = None
    if state.nested:
        nested = NestedScales(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    shape = linear.out_features, linear.in_features
    return Nf4Weight(weight.data.view(torch.uint8), state.absmax, shape, nested, state.blocksize)


def write_weight(linear: Linear, out: Tensor) -> None:
    """Write a linear layer's weight into ``out`` [out_features, in_features], in that dtype, however it is stored."""
    stored = nf4_weight(linear)
    if stored is None:
        out.copy_(linear.base.weight.detach())
    else:
        nf4.dequantize(**stored._asdict(), dtype=out.dtype, out=out)


def unpack_for_training(linear: Linear) -> None:
    """Undo bitsandbytes' repacking of a 4-bit weight for its inference kernel on a CPU, if it happened.

    Its first forward without gradients on a CPU with AVX512-BF16 rewrites the weight into a layout that no training
    kernel reads (bitsandbytes 0.50, ``nn/modules.py``). The block scales come back rounded to bf16, as the packing left
    them; load the base anew where the last bit counts.
    """
    weight: Any = linear.base.weight
    state = getattr(weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        if state.absmax.ndim == 2:
            # Plain scales come back as the kernel's [in / blocksize, out] in bf16.
            state.absmax = state.absmax.T.reshape(-1).float()
        weight.quant_state = state
