"""The MXFP4 dequantiser gives Transformers' own values, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from slimtune.engine.kernels import mxfp4
from tests.engine.kernels.maker import Maker


def packed(make: Maker, stack: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Any codes, with exponents as models have them."""
    draw = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (stack, rows, columns // 2), dtype=torch.uint8, generator=draw)
    exponents = torch.randint(112, 132, (stack, rows, columns // 32), dtype=torch.uint8, generator=draw)
    return blocks.to(make.device), exponents.to(make.device)


def transformers(blocks: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    made = convert_moe_packed_tensors(blocks.unflatten(2, (-1, 16)), exponents, dtype=dtype)
    return made.transpose(1, 2).to(blocks.device)


@pytest.mark.parametrize("shape", [(1, 5, 32), (3, 7, 96), (2, 40, 576)])
def test_equals_transformers(make: Maker, shape: tuple[int, int, int]) -> None:
    blocks, exponents = packed(make, *shape)
    want = transformers(blocks, exponents, make.dtype)
    found = mxfp4.dequantize_stack(blocks, exponents, dtype=make.dtype)
    assert torch.equal(found, want)
    assert torch.equal(found.signbit(), want.signbit())
    last = mxfp4.dequantize_stack(blocks[-1:], exponents[-1:], dtype=make.dtype)
    assert torch.equal(last, want[-1:])


@pytest.mark.parametrize("extra", [24, 8, 3])
def test_writes_into_the_columns_of_a_wider_buffer(make: Maker, extra: int) -> None:
    blocks, exponents = packed(make, 3, 7, 96)
    out = make.strided(3, 7, 96, extra=extra)
    weight = mxfp4.dequantize_stack(blocks, exponents, dtype=make.dtype, out=out)
    assert weight.data_ptr() == out.data_ptr()
    assert torch.equal(out, transformers(blocks, exponents, make.dtype))
    assert torch.isnan(out._base[..., 96:]).all(), "wrote outside its columns"


def test_every_code_with_every_exponent(make: Maker) -> None:
    """2^-127, which has no exponent of its own in float32, among them; 255 stands for no number."""
    exponents = torch.arange(255, dtype=torch.uint8, device=make.device).view(1, 255, 1)
    codes = torch.arange(16, dtype=torch.uint8, device=make.device).repeat(2).view(16, 2)
    blocks = (codes[:, 0] | codes[:, 1] << 4).expand(1, 255, 16).contiguous()
    want = transformers(blocks, exponents, make.dtype)
    found = mxfp4.dequantize_stack(blocks, exponents, dtype=make.dtype)
    assert torch.equal(found, want)
