"""Loss and gradient of the logits against torch's own in float64."""

from __future__ import annotations

import pytest
import torch

from slimtune.engine.kernels import cross_entropy
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

SHAPES = [(7, 32000), (3, 49152), (2, 151936), (5, 1001)]


def autograd(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else torch.tanh(leaf / softcap) * softcap
    loss = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-100, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("on_device", [True, False])
def test_loss_and_gradient(make: Maker, shape: tuple[int, int], on_device: bool) -> None:
    rows, vocabulary = shape
    logits = make.strided_copy(make(rows, vocabulary, scale=4.0), extra=vocabulary % 8 or 8)
    targets = torch.randint(vocabulary, (rows,), generator=make.generator).to(make.device)
    targets[0], targets[-1] = vocabulary - 1, 0
    scale = 0.37
    want_loss, want_grad = autograd(logits, targets, scale)
    loss = cross_entropy.loss_and_grad_(
        logits, targets, torch.tensor(scale, device=make.device) if on_device else scale
    )
    assert_close(loss, want_loss, dtype=torch.float32)
    assert_close(logits, want_grad, dtype=make.dtype)
    assert torch.isnan(logits._base[:, vocabulary:]).all(), "wrote outside its columns"


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_soft_cap(make: Maker, shape: tuple[int, int]) -> None:
    """Gemma 2's; logits far past it too."""
    logits = make(*shape, scale=20.0)
    targets = torch.randint(shape[1], shape[:1], generator=make.generator).to(make.device)
    targets[0] = -100
    want_loss, want_grad = autograd(logits, targets, 0.5, 30.0)
    loss = cross_entropy.loss_and_grad_(logits, targets, 0.5, softcap=30.0)
    assert_close(loss, want_loss, dtype=torch.float32)
    assert_close(logits, want_grad, dtype=make.dtype)


def test_rows_without_a_target_are_zero_whatever_they_hold(make: Maker) -> None:
    logits = make(4, 5000)
    logits[1] = float("inf")
    targets = torch.tensor([3, -100, -100, 4999], device=make.device)
    want_loss, want_grad = autograd(logits[[0, 3]], targets[[0, 3]], 1.0)
    loss = cross_entropy.loss_and_grad_(logits, targets, 1.0)
    assert_close(loss, want_loss, dtype=torch.float32)
    assert_close(logits[[0, 3]], want_grad, dtype=make.dtype)
    assert torch.equal(logits[1:3], torch.zeros_like(logits[1:3]))


@pytest.mark.parametrize("target", [1, 998])
def test_large_logits_neither_overflow_nor_lose_digits(make: Maker, target: int) -> None:
    logits = make(1, 1000) + 60000.0 * (torch.arange(1000, device=make.device) % 2).to(make.dtype)
    targets = torch.tensor([target], device=make.device)
    want_loss, want_grad = autograd(logits, targets, 1.0)
    loss = cross_entropy.loss_and_grad_(logits, targets, 1.0)
    assert_close(loss, want_loss, dtype=torch.float32)
    assert_close(logits, want_grad, dtype=make.dtype)
