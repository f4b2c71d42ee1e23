"""Head and loss: in chunks, on supervised rows alone, with the gradient of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimtune.engine.loss import head_loss, head_loss_and_grad, token_log_probs
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
