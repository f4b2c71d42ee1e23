"""The gated delta rule over packed documents, by kernels of its own (:mod:`slimtune.engine.kernels.delta_chunks`).

What is computed: :mod:`slimtune.engine.kernels.reference_delta`. Triton has computed such kernels' backward wrongly on
one architecture and not on another: on a GPU they are compared with the specification once (:func:`is_right`), and it
is taken instead if they differ. It waits for nothing, so a CUDA graph follows either.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.kernels import delta_chunks
from slimtune.engine.kernels import reference_delta as reference
from slimtune.engine.kernels._triton import TritonError, cdiv, pow2, runs_on_triton
from slimtune.engine.kernels.reference_delta import CHUNK, DeltaHeads, DeltaSaved

__all__ = ["DeltaHeads", "DeltaSaved", "delta_backward", "delta_forward", "is_right"]

_BLOCK = 64
"""Columns of a state that one program carries, at most."""
_TOKENS = 32


def delta_forward(
    mixed: Tensor, g: Tensor, beta: Tensor, starts: Tensor, boundaries: Tensor, heads: DeltaHeads
) -> tuple[Tensor, DeltaSaved]:
    """See :func:`slimtune.engine.kernels.reference_delta.delta_forward`."""
    if not _is_taken(mixed, heads):
        return reference.delta_forward(mixed, g, beta, starts, boundaries, heads)
    return _forward(mixed, g, beta, starts, boundaries, heads)


def delta_backward(
    do: Tensor,
    mixed: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor,
    boundaries: Tensor,
    heads: DeltaHeads,
    saved: DeltaSaved,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_delta.delta_backward`."""
    if not _is_taken(mixed, heads):
        return reference.delta_backward(do, mixed, g, beta, starts, boundaries, heads, saved)
    return _backward(do, mixed, g, beta, starts, boundaries, heads, saved)


def _is_taken(mixed: Tensor, heads: DeltaHeads) -> bool:
    if not runs_on_triton(mixed):
        return False
    # What a number of heads changes is how often a kernel runs.
    return not mixed.is_cuda or is_right(mixed.device, mixed.dtype, heads.key_dim, heads.value_dim)


@cache
def is_right(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether the kernels compute on this device what the specification does in float64.

    Draws from a generator of its own.
    """
    right = torch.cuda.get_device_capability(device)[0] >= 8  # before, Triton has no tensor cores for float32
    lengths, heads = (150, 9, 64, 1, 32), DeltaHeads(1, 2, key_dim, value_dim)
    tokens, generator = sum(lengths), torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *lengths, 0]).cumsum(0).int()
    starts = ends[: len(lengths)].repeat_interleave(torch.tensor(lengths))
    mixed, do = (
        torch.randn(tokens, columns, generator=generator).to(device, dtype)
        for columns in (sum(heads.columns), heads.columns[2])
    )
    g, beta = torch.rand(2, tokens, heads.values, generator=generator).to(device)
    where = starts.to(device), ends.to(device), heads

    def computed(forward: Any, backward: Any, wide: torch.dtype | None) -> list[Tensor]:
        inputs = [x if wide is None else x.to(wide) for x in (mixed, -g, beta)]
        o, saved = forward(*inputs, *where)
        return [o, *backward(do if wide is None else do.to(wide), *inputs, *where, saved)]

    bound = 1e-4 if dtype == torch.float32 else 2e-2
    try:
        expected = computed(reference.delta_forward, reference.delta_backward, torch.float64)
        right = right and all(
            bool((a.double() - b).norm() <= bound * b.norm())
            for a, b in zip(computed(_forward, _backward, None), expected, strict=True)
        )
    except (RuntimeError, TritonError):  # no kernel for it
        right = False
    if not right:
        warnings.warn(
            f"slimtune's gated delta rule is wrong, or has no kernel, on {device} in {dtype}, heads of {key_dim} and "
            f"{value_dim}: plain products are taken, which are slower",
            stacklevel=2,
        )
    return right


def _sizes(mixed: Tensor, heads: DeltaHeads) -> dict[str, Any]:
    """What all kernels take by name."""
    return {
        "GROUP": heads.values // heads.keys,
        "KEY_DIM": heads.key_dim,
        "DIM": heads.value_dim,
        "CHUNK": CHUNK,
        "KEYS": max(pow2(heads.key_dim), 16),
        "BLOCK": max(min(pow2(heads.value_dim), _BLOCK), 16),
        "PRECISION": "tf32x3" if mixed.dtype == torch.float32 else "tf32",
        "enable_fp_fusion": True,
    }


def _forward(
    mixed: Tensor, g: Tensor, beta: Tensor, starts: Tensor, boundaries: Tensor, heads: DeltaHeads
) -> tuple[Tensor, DeltaSaved]:
    tokens, (keys, _, values), sizes = len(mixed), heads.columns, _sizes(mixed, heads)
    chunks, length = cdiv(tokens, CHUNK), heads.key_dim**-0.5
    saved = DeltaSaved(
        *(
            torch.empty(chunks, heads.values, *shape, dtype=torch.float32, device=mixed.device)
            for shape in ((heads.key_dim, heads.value_dim), (CHUNK, CHUNK), (CHUNK, heads.value_dim))
        )
    )
    o = mixed.new_empty(tokens, values)
    columns, stride = cdiv(heads.value_dim, sizes["BLOCK"]), mixed.stride(0)
    g, beta = g.contiguous(), beta.contiguous()
    inner = {key: value for key, value in sizes.items() if key not in ("DIM", "BLOCK", "PRECISION")}
    delta_chunks.inverses[(chunks, heads.values)](
        mixed, g, beta, starts, saved.inverse, tokens, stride, keys, heads.values, **inner,
        LEVELS=CHUNK.bit_length() - 1, PRECISION="tf32x3", num_warps=4, num_stages=1,
    )  # fmt: skip
    delta_chunks.states[(len(boundaries) - 1, heads.values, columns)](
        mixed, g, beta, boundaries, saved.inverse, saved.states, saved.delta, stride, keys, 2 * keys, heads.values,
        **sizes, num_warps=4, num_stages=1,
    )  # fmt: skip
    delta_chunks.outputs[(chunks, heads.values, columns)](
        mixed, g, starts, saved.states, saved.delta, o, tokens, stride, keys, heads.values, length,
        **sizes, num_warps=4, num_stages=1,
    )  # fmt: skip
    return o, saved


def _backward(
    do: Tensor,
    mixed: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor,
    boundaries: Tensor,
    heads: DeltaHeads,
    saved: DeltaSaved,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, (keys, _, _), sizes = len(mixed), heads.columns, _sizes(mixed, heads)
    chunks, length, stride = cdiv(tokens, CHUNK), heads.key_dim**-0.5, mixed.stride(0)
    columns = cdiv(heads.value_dim, sizes["BLOCK"])
    g, beta, do = g.contiguous(), beta.contiguous(), do.contiguous()
    dvalues, dlast, dmixed = torch.empty_like(saved.delta), torch.empty_like(saved.states), torch.empty_like(mixed)
    dg, dbeta = torch.empty_like(g, dtype=torch.float32), torch.empty_like(beta, dtype=torch.float32)
    dq, dk = torch.empty(2, tokens, heads.values, heads.key_dim, dtype=torch.float32, device=mixed.device)
    delta_chunks.through[(chunks, heads.values, columns)](
        do, mixed, g, starts, dvalues, tokens, stride, keys, heads.values, length, **sizes, num_warps=4, num_stages=1,
    )  # fmt: skip
    delta_chunks.states_back[(len(boundaries) - 1, heads.values, columns)](
        do, mixed, g, beta, boundaries, saved.inverse, dvalues, dlast, tokens, stride, keys, heads.values, length,
        **sizes, num_warps=4, num_stages=1,
    )  # fmt: skip
    delta_chunks.gradients[(chunks, heads.values)](
        do, mixed, g, beta, starts, saved.states, saved.delta, dvalues, dlast, dq, dk, dmixed, dg, dbeta,
        tokens, stride, keys, 2 * keys, dmixed.stride(0), heads.values, length,
        **sizes | {"BLOCK": 16 if mixed.dtype == torch.float32 else min(sizes["BLOCK"], 32)}, num_warps=8, num_stages=1,
    )  # fmt: skip
    for d, column, whole in ((dq, 0, length), (dk, keys, 1.0)):
        delta_chunks.lengths_back[(cdiv(tokens, _TOKENS), heads.keys)](
            d, mixed, dmixed, tokens, stride, dmixed.stride(0), column, heads.values, whole, GROUP=sizes["GROUP"],
            KEY_DIM=heads.key_dim, KEYS=sizes["KEYS"], BLOCK=_TOKENS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return dmixed, dg, dbeta
