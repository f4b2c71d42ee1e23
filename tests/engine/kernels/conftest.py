"""Kernel tests run three times: on the reference path (no GPU), under Triton's interpreter (test_interpreter.py), and
on a GPU where there is one."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.kernels.maker import Maker

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def make(device: str, dtype: torch.dtype) -> Maker:
    return Maker(device, dtype)


@pytest.fixture(autouse=INTERPRETED)
def _interpreter_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter as a GPU computes: it cuts float32 off to bfloat16 instead of rounding to nearest, and
    to e4m3 without a carry, and multiplies the bits of bfloat16 matrices as if they were integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cut, dot, convert = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp

    def rounded_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cut(self, src, dst_type)

    def widened_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def saturated(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(src.data)).clamp(-448, 448).to(torch.float8_e4m3fn)
            return interpreter.TensorHandle(values.view(torch.uint8).numpy(), tl.float8e4nv)
        return convert(self, src, dst_type, rounding)

    monkeypatch.setattr(builder, "create_fp_to_fp", saturated)
    monkeypatch.setattr(builder, "cast_impl", rounded_cast)
    monkeypatch.setattr(builder, "create_dot", widened_dot)
