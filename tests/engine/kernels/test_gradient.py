"""Norm, clipping factor and non-finite flag against torch's ``clip_grad_norm_``."""

from __future__ import annotations

import pytest
import torch

from slimtune.engine.kernels import gradient


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_factor_is_clip_grad_norms(device: str, size: float) -> None:
    grads = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(device) * size
    factor, nonfinite = gradient.clip_factor(gradient.global_norm(grads), 1.0)
    parameter = torch.nn.Parameter(torch.zeros_like(grads))
    parameter.grad = grads.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert torch.allclose(gradient.global_norm(grads), norm)
    assert torch.allclose(grads * factor, parameter.grad)
    assert not nonfinite


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_single_value_that_is_not_finite_raises_the_flag(device: str, value: float) -> None:
    grads = torch.ones(5000, device=device)
    grads[4321] = value
    factor, nonfinite = gradient.clip_factor(gradient.global_norm(grads), 1.0)
    assert nonfinite
    assert factor == 1.0
