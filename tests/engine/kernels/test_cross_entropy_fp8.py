"""Loss and gradient in FP8 of the logits: against float64, and the kernel against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import cross_entropy, cross_entropy_fp8, reference_fp8
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close, relative_error

CAPS = (None, 5.0)


def rounded_up(vocabulary: int) -> int:
    return -(-vocabulary // 16) * 16


def made(make: Maker, rows: int, vocabulary: int, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits in a buffer of whole sixteens, with poison behind them; the first row has its peak for a target, the
    second none."""
    logits = make.poisoned(rows, rounded_up(vocabulary))
    logits[:, :vocabulary] = make(rows, vocabulary, scale=scale)
    targets = torch.randint(vocabulary, (rows,), generator=make.generator).to(make.device)
    targets[0], targets[1], targets[2] = logits[0, :vocabulary].argmax(), -100, vocabulary - 1
    return logits, targets


def expected(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else torch.tanh(leaf / softcap) * softcap
    loss = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-100, reduction="sum")
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("vocabulary", [1001, 16385, 32000])
def test_loss_and_gradient(make: Maker, vocabulary: int, softcap: float | None) -> None:
    logits, targets = made(make, 4, vocabulary)
    plain, buffer, width, again = logits[:, :vocabulary].clone(), logits.clone(), logits.shape[1], 512
    want_loss, want = expected(plain, targets, softcap)
    loss, rows, scales, own = cross_entropy_fp8.loss_and_grad_(
        buffer, targets, vocabulary, again=again, softcap=softcap
    )
    assert_close(loss, want_loss, dtype=torch.float32)
    assert_close(loss, cross_entropy.loss_and_grad_(plain, targets, 1.0, softcap=softcap), dtype=torch.float32)
    assert rows.data_ptr() == buffer.data_ptr()
    assert rows.stride(0) % 16 == 0
    assert torch.equal(rows[:, width:].float(), rows[:, :again].float())
    rows = rows[:, :width]
    assert not rows[:, vocabulary:].float().any()
    assert not any(part[1].float().any() for part in (rows, scales, own))

    index = targets.clamp(min=0)[:, None]
    assert_close(own, -want.gather(1, index), dtype=torch.float32)
    assert not rows.float().gather(1, index).any()
    others = want.scatter(1, index, 0.0)
    found = (rows.float() * scales)[:, :vocabulary].double()
    # Up or down: a step of e4m3's four digits, or of 2⁻⁹ where a row's largest is 448.
    step = others.abs() * 2.0**-3 + scales.double() * 2.0**-9
    assert ((found - others).abs() <= 1.001 * step).all()
    if softcap is None:
        assert rows.float().amax(1)[[0, 2, 3]].tolist() == [448.0] * 3

    reference = reference_fp8.loss_and_grad_(logits.clone(), targets, vocabulary, again=again, softcap=softcap)
    differ = reference[1][:, :width].view(torch.uint8) != rows.view(torch.uint8)
    assert float(differ.float().mean()) < 1e-3
    assert all(relative_error(mine, its) < 1e-6 for mine, its in zip((scales, own), reference[2:], strict=True))


def test_a_target_that_is_certain_has_no_gradient_and_one_that_is_nearly_so_keeps_its_digits(make: Maker) -> None:
    """Where 1 - p is made of p, all of its digits are gone."""
    logits = make.poisoned(2, 1008)
    logits[:, :1001] = 0.0
    logits[0, 7], logits[1, 7] = 200.0, 24.0
    targets = torch.tensor([7, 7], device=make.device)
    _, want = expected(logits[:, :1001].clone(), targets, None)
    _, rows, scales, own = cross_entropy_fp8.loss_and_grad_(logits, targets, 1001)
    assert own[0].item() == 0.0
    assert torch.isfinite(rows.float() * scales).all()
    assert_close(own[1], -want[1, 7:8], dtype=torch.float32)
    assert_close(scales[1] * 448, want[1, :1], dtype=torch.float32)


def test_a_far_tail_is_there_on_average(make: Maker) -> None:
    """Each of its numbers would be rounded to zero, and it is a fortieth of what isn't the target's."""
    logits = make.poisoned(4, 32000)
    logits[:] = make(4, 32000) * 0.25 - 14.0
    logits[:, 5] = 0.0
    targets = torch.tensor([3, 5, 7, 31999], device=make.device)
    _, want = expected(logits.clone(), targets, None)
    _, rows, scales, own = cross_entropy_fp8.loss_and_grad_(logits, targets, 32000)
    found = (rows.float() * scales).double()
    tail = torch.arange(32000, device=make.device) != 5
    tail = tail & (torch.arange(32000, device=make.device) != targets[:, None])
    for row in (0, 2, 3):
        assert found[row, tail[row]].sum() == pytest.approx(float(want[row, tail[row]].sum()), rel=0.05)
        # In each part of the vocabulary.
        halves = [
            (found[row, at].sum() / want[row, at].sum()).item() for at in (slice(100, 15000), slice(15000, 31000))
        ]
        assert halves == pytest.approx([1.0, 1.0], rel=0.05)
    assert_close((rows.float() * scales).sum(1), own[:, 0], dtype=torch.bfloat16)


def test_a_chunk_is_rounded_as_it_is_in_the_whole(make: Maker) -> None:
    """So that a plan with other chunks trains alike."""
    logits, targets = make(24, 1008) * 4.0, torch.arange(24, device=make.device)
    _, rows, *_ = cross_entropy_fp8.loss_and_grad_(logits.clone(), targets, 1008)
    for start in (0, 7, 16):
        part = slice(start, start + 9)
        _, chunk, *_ = cross_entropy_fp8.loss_and_grad_(logits[part].clone(), targets[part], 1008, before=start)
        assert torch.equal(chunk.float(), rows[part].float())


@pytest.mark.parametrize("together", [True, False], ids=["rows", "one-place"])
def test_what_is_rounded_is_right_on_average(make: Maker, together: bool) -> None:
    """In many rows, and where it is always the first of a micro-batch. By the nearest number a column is up to 0.06
    off, and all of them 6e-4; by the same draws at the same place a column is 0.2 off."""
    logits = make(256, 1008)
    logits[:] = torch.linspace(0.0, 11.0, 1008) + make(256, 1008) * 0.02
    targets = torch.full((256,), 3, device=make.device)
    _, want = expected(logits.clone(), targets, None)
    found = torch.empty_like(want)
    for rows in [slice(None)] if together else [slice(row, row + 1) for row in range(256)]:
        _, eighths, scales, _ = cross_entropy_fp8.loss_and_grad_(logits[rows], targets[rows], 1008)
        found[rows] = (eighths.float() * scales).double()
    apart = (found - want).mean(0) / want.mean(0)
    apart[3] = 0.0
    assert apart.abs().max() < 0.04
    assert apart.mean().abs() < 2e-4


@pytest.mark.parametrize("hidden", [48, 1040])
def test_the_targets_rows_are_taken_as_a_product_has_them(make: Maker, hidden: int) -> None:
    head, y = make(64, hidden), make(5, hidden)
    scales = head.abs().amax(0).float() / 448
    targets, again = torch.tensor([0, 31, 32, -100, 63], device=make.device), 32
    own = torch.rand(5, 1, generator=make.generator).to(make.device)
    given, reference = y.clone(), y.clone()
    cross_entropy_fp8.subtract_targets_(y, head, targets, own, scales, again)
    reference_fp8.subtract_targets_(reference, head, targets, own, scales, again)
    assert_close(y, reference, dtype=y.dtype)
    assert torch.equal(y[3], given[3])
    exact = given.double() - own.double() * head.double()[targets.clamp(min=0)]
    assert_close(y[:2], exact[:2], dtype=y.dtype)
    rounded = (head[[32, 63]].float() * (1.0 / scales)).to(torch.float8_e4m3fn).double() * scales.double()
    assert_close(y[[2, 4]], given[[2, 4]].double() - own[[2, 4]].double() * rounded, dtype=y.dtype)


def test_what_is_no_number_makes_a_loss_that_is_none(make: Maker) -> None:
    for bad in (float("nan"), float("inf")):
        logits, targets = made(make, 3, 1001)
        logits[0, 5] = bad
        assert not torch.isfinite(cross_entropy_fp8.loss_and_grad_(logits, targets, 1001)[0])
