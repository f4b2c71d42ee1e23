"""Head and loss: in chunks, on supervised rows alone, with the gradient of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimtune.engine.fp8 import Fp8
from slimtune.engine.fp8_head import Fp8Head
from slimtune.engine.loss import head_loss, head_loss_and_grad, loss_and_grad_of_chunk, token_log_probs
from slimtune.engine.structure import Norm

TOKENS, HIDDEN, VOCABULARY = 30, 16, 53


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_loss_and_gradient_equal_autograd(chunk: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    head, weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64), torch.rand(HIDDEN, dtype=torch.float64)
    norm = Norm(weight, 1e-5)
    rows, targets = torch.tensor([0, 3, 4, 17, 29]), torch.tensor([5, 0, 52, 7, 7])
    g = torch.full((TOKENS, HIDDEN), torch.nan, dtype=torch.float64)
    loss = head_loss_and_grad(x, residual, norm, head, rows, targets, chunk, g)

    total = (x + residual).requires_grad_()
    normed = nn.functional.rms_norm(total, (HIDDEN,), weight, 1e-5)[rows]
    expected = nn.functional.cross_entropy(normed @ head.T, targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(g, total.grad)
    torch.testing.assert_close(head_loss(x, residual, norm, head, rows, targets, chunk), expected.detach())

    weights = torch.tensor([1.0, 0.25, 0.25, 1.0, 0.0], dtype=torch.float64)
    loss = head_loss_and_grad(x, residual, norm, head, rows, targets, chunk, g, weights=weights)
    torch.testing.assert_close(loss, expected.detach())
    total.grad = None
    normed = nn.functional.rms_norm(total, (HIDDEN,), weight, 1e-5)[rows]
    (weights * nn.functional.cross_entropy(normed @ head.T, targets, reduction="none")).sum().backward()
    torch.testing.assert_close(g, total.grad)


def test_no_supervised_token() -> None:
    norm = Norm(torch.ones(HIDDEN), 1e-5)
    none = torch.zeros(0, dtype=torch.int64)
    g = torch.full((TOKENS, HIDDEN), torch.nan)
    x = torch.randn(TOKENS, HIDDEN)
    loss = head_loss_and_grad(x, x, norm, torch.randn(VOCABULARY, HIDDEN), none, none, 8, g)
    assert loss.item() == 0.0
    assert not g.any()


@pytest.mark.parametrize("chunk", [4, 100])
def test_token_log_probs_equal_autograd_for_any_loss_of_them(chunk: int) -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    log_probs, entropy, is_top1 = token_log_probs(hidden, head, targets, chunk)
    weights = torch.rand(TOKENS)
    (log_probs.exp() * weights).sum().backward()
    found, hidden.grad = hidden.grad, None

    distribution = torch.distributions.Categorical(logits=hidden @ head.T)
    expected = distribution.log_prob(targets)
    (expected.exp() * weights).sum().backward()
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, distribution.entropy())
    assert torch.equal(is_top1, (hidden @ head.T).argmax(-1) == targets)
    torch.testing.assert_close(found, hidden.grad)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_loss_with_the_entropy_has_its_gradient(softcap: float | None) -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN)
    targets, weights = torch.randint(0, VOCABULARY, (TOKENS,)), torch.rand(2, TOKENS)

    def gradient(log_probs: Tensor, entropy: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((weights[0] * log_probs).sum() + (weights[1] * entropy).sum(), hidden)
        return found

    log_probs, entropy, _ = token_log_probs(hidden, head, targets, 7, softcap)
    logits = hidden @ head.T
    expected = torch.distributions.Categorical(
        logits=logits if softcap is None else softcap * (logits / softcap).tanh()
    )
    alone = torch.autograd.grad(entropy.sum(), hidden, retain_graph=True)
    torch.testing.assert_close(alone, torch.autograd.grad(expected.entropy().sum(), hidden, retain_graph=True))
    torch.testing.assert_close(
        gradient(log_probs, entropy), gradient(expected.log_prob(targets), expected.entropy()), rtol=1e-4, atol=1e-5
    )


def in_bfloat16(vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Norm]:
    """x, its residual, a head and a norm; some logits are large."""
    draw = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, TOKENS, hidden, generator=draw).bfloat16()
    head = torch.randn(vocabulary, hidden, generator=draw).bfloat16() * 0.7
    return x, residual, head, Norm(torch.rand(hidden, generator=draw).bfloat16() + 0.5, 1e-5)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("vocabulary", [4096, 4999])
def test_the_heads_way_back_in_fp8_is_a_rounding_from_the_gradient(vocabulary: int, softcap: float | None) -> None:
    """In chunks, the last of them smaller; the loss is that of the same logits."""
    x, residual, head, norm = in_bfloat16(vocabulary, 64)
    rows, switch = torch.arange(0, TOKENS, 2), Fp8()
    targets = torch.randint(vocabulary, rows.shape, generator=torch.Generator().manual_seed(1))
    eighths = Fp8Head(head, switch)
    given = x, residual, norm, head, rows, targets, 7

    total = (x + residual).double().requires_grad_()
    normed = nn.functional.rms_norm(total, (64,), norm.weight.double(), 1e-5)[rows]
    logits = normed @ head.double().t()
    capped = logits if softcap is None else softcap * (logits / softcap).tanh()
    nn.functional.cross_entropy(capped, targets, reduction="sum").backward()

    plain, found, at_once, off = (torch.full_like(x, torch.nan) for _ in range(4))
    loss = head_loss_and_grad(*given, plain, softcap=softcap)
    torch.testing.assert_close(head_loss_and_grad(*given, found, softcap=softcap, in_fp8=eighths), loss)
    apart = (found.double() - total.grad).norm() / total.grad.norm()
    own = (plain.double() - total.grad).norm() / total.grad.norm()
    assert own < apart < 0.035
    assert not found[1::2].any()
    head_loss_and_grad(*given[:-1], TOKENS, at_once, softcap=softcap, in_fp8=eighths)
    assert (found - at_once).norm() < 0.005 * found.norm()  # the same roundings
    with switch.off():
        assert torch.equal(head_loss_and_grad(*given, off, softcap=softcap, in_fp8=eighths), loss)
    assert torch.equal(off, plain)


def test_what_fp8_rounds_in_the_heads_gradient_cancels_over_tokens() -> None:
    """Else a training comes to rest elsewhere than in 16 bits."""
    draw = torch.Generator().manual_seed(0)
    vocabulary, hidden, tokens = 4000, 64, 2048
    head = torch.randn(vocabulary, hidden, generator=draw) * 0.3 + torch.randn(hidden, generator=draw) * 0.3
    head, x = head.bfloat16(), torch.randn(tokens, hidden, generator=draw).bfloat16()
    probabilities = (x.float() @ head.float().t()).softmax(-1)
    targets = torch.multinomial(probabilities, 1, generator=draw)
    y, buffer = x.clone(), torch.empty(tokens, vocabulary).bfloat16()
    loss_and_grad_of_chunk(y, head, targets[:, 0], buffer, in_fp8=Fp8Head(head, Fp8()))
    expected = (probabilities - torch.zeros_like(probabilities).scatter_(1, targets, 1.0)) @ head.float()
    apart = y.float() - expected
    assert apart.norm() < 0.045 * expected.norm()
    assert apart.sum(0).norm() < 1.5 * apart.norm()  # independent roundings' sum is as large as they


def test_a_turned_head_is_the_head_but_for_rounding() -> None:
    head = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    head[:, 3] = 0.0
    made = Fp8Head(head, Fp8())
    assert made.turned.shape == (32, 5008 + 304)
    assert not made.turned[:, 5000:5008].float().any()
    wide, given = made.turned[:, :5000].float() * made.scales[:, None], head.t().float()
    assert ((wide - given).abs() <= given.abs() * 2.0**-4 + made.scales[:, None] * 2.0**-10).all()
    assert made.turned.float().abs().amax(1).tolist() == [448.0] * 3 + [0.0] + [448.0] * 28
    whole = wide[:, :304] + made.turned[:, 5008:].float() * made.scales[:, None]
    assert ((whole - given[:, :304]).abs() <= given[:, :304].abs() * 2.0**-8 + made.scales[:, None] * 2.0**-10).all()
    assert made.turned.nbytes + made.scales.nbytes == Fp8Head.bytes_of(lambda *shape: True, 1, 5000, 32)
    assert Fp8Head.bytes_of(lambda *shape: True, 1, 5000, 40) == Fp8Head.bytes_of(lambda *shape: False, 1, 64, 32) == 0
