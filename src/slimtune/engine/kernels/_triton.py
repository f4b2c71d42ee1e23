"""Triton where there is one, and which tensors run on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.runtime.errors import TritonError
except ModuleNotFoundError:  # torch for a machine without an NVIDIA or AMD GPU comes without Triton
    triton = tl = None
    TritonError = RuntimeError

__all__ = [
    "TritonError",
    "cdiv",
    "constant",
    "interpreted",
    "jit",
    "jit_one_for_all",
    "pow2",
    "row_alignment",
    "runs_on_triton",
    "shared_memory",
    "tl",
]


def jit(function: Any) -> Any:
    """``triton.jit``; without Triton the function itself, which is then never called."""
    return function if triton is None else triton.jit(function)


def jit_one_for_all(*names: str) -> Callable[[Any], Any]:
    """:func:`jit` without special code for arguments of these names that happen to be multiples of 16."""
    return lambda function: function if triton is None else triton.jit(function, do_not_specialize=names)


def constant(value: float | str) -> Any:
    """A number or text of a module's that its kernels may read."""
    return value if tl is None else tl.constexpr(value)


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, which knows no assembler."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def runs_on_triton(x: Tensor) -> bool:
    """Whether kernels take x: on CUDA, and on the CPU under Triton's interpreter; never in float64."""
    if triton is None or x.dtype == torch.float64:
        return False
    return x.is_cuda or interpreted()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def pow2(n: int) -> int:
    """The least power of two that is at least n; a block's sizes are powers of two."""
    return 1 << (n - 1).bit_length()


def row_alignment(*matrices: Tensor | None) -> int:
    """Elements, at most 8, that every row's start is a multiple of: how wide a kernel may read and write.

    Triton finds out by itself only whether a stride is a multiple of 16. A row of [T, H + 24] isn't, but 16-byte
    accesses fit it all the same.
    """
    strides = [stride for m in matrices if m is not None for stride in m.stride()[:-1]]
    return math.gcd(8, *strides)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take: on a GPU what it has, in the interpreter any number; 0: no
    Triton for this device."""
    if triton is None:
        return 0
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
    return 1 << 40 if triton.knobs.runtime.interpret else 0
