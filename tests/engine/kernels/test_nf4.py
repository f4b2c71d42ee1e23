"""The NF4 dequantiser gives bitsandbytes' own values, to the bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from slimtune.base.packed import Nf4Tensor
from slimtune.engine.kernels import nf4
from tests.engine.kernels.maker import Maker

SHAPES = [(576, 576), (192, 576), (13, 128), (5, 1536), (7, 192)]


def quantised(make: Maker, shape: tuple[int, int], *, double: bool) -> tuple[Tensor, bnb.QuantState]:
    """A weight whose blocks differ in scale over several powers of ten, as bitsandbytes stores it."""
    spread = 10.0 ** make(shape[0], 1, dtype=torch.float32)
    return bnb.quantize_4bit(
        make(*shape) * spread.to(make.dtype), quant_type="nf4", blocksize=64, compress_statistics=double
    )


def arguments(packed: Tensor, state: bnb.QuantState) -> dict[str, object]:
    nested = state.state2 and nf4.NestedScales(state.state2.absmax, state.state2.code, state.offset)
    return {"packed": packed, "absmax": state.absmax, "shape": tuple(state.shape), "nested": nested}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_equals_bitsandbytes(make: Maker, shape: tuple[int, int], double: bool) -> None:
    packed, state = quantised(make, shape, double=double)
    want = bnb.dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantize(**arguments(packed, state), dtype=make.dtype), want)


@pytest.mark.parametrize("extra", [24, 8, 3])
def test_writes_into_the_columns_of_a_wider_buffer(make: Maker, extra: int) -> None:
    packed, state = quantised(make, (192, 576), double=True)
    out = make.strided(192, 576, extra=extra)
    weight = nf4.dequantize(**arguments(packed, state), dtype=make.dtype, out=out)
    assert weight.data_ptr() == out.data_ptr()
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))
    assert torch.isnan(out._base[:, 576:]).all(), "wrote outside its columns"


@pytest.mark.parametrize("columns", [64, 28, 30])
def test_rows_that_are_no_whole_number_of_blocks(make: Maker, columns: int) -> None:
    packed, state = quantised(make, (33, columns), double=False)
    want = bnb.dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantize(**arguments(packed, state), dtype=make.dtype), want)


def stack_arguments(packed: Nf4Tensor, first: int = 0) -> dict[str, object]:
    """The parts from a matrix on; the codes of scales are bitsandbytes'."""
    parts = {name: part[first:] for name, part in packed.parts.items()}
    nested = None
    if "scale" in parts:
        code = bnb.create_dynamic_map().to(packed.device)
        nested = nf4.NestedScales(parts["scale"], code, parts["offset"])
    return {"packed": parts["codes"], "absmax": parts["absmax"], "shape": tuple(packed.shape[1:]), "nested": nested}


@pytest.mark.parametrize("shape", [(3, 192, 576), (5, 13, 128), (2, 33, 24), (1, 5, 30)])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_stack_is_its_matrices(make: Maker, shape: tuple[int, int, int], double: bool) -> None:
    spread = 10.0 ** make(*shape[:2], 1, dtype=torch.float32)
    packed = Nf4Tensor.quantize(make(*shape) * spread.to(make.dtype), double_quant=double)
    out = make.strided(*shape)
    weight = nf4.dequantize_stack(**stack_arguments(packed), dtype=make.dtype, out=out)
    assert weight.data_ptr() == out.data_ptr()
    assert torch.equal(weight, packed.unpack())
    assert torch.isnan(out._base[..., shape[2] :]).all(), "wrote outside its columns"
    last = nf4.dequantize_stack(**stack_arguments(packed, shape[0] - 1), dtype=make.dtype)
    assert torch.equal(last, packed.unpack()[-1:])
