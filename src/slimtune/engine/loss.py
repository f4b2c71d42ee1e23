"""Head and loss on the supervised tokens alone, in chunks, with the gradient in the forward pass.

The head is frozen, so a row's gradient is known as soon as its logits are: logits and gradient share one buffer of a
chunk, and [T, vocabulary] never exists. Shapes: n supervised tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.engine.fp8_head import Fp8Head
from slimtune.engine.kernels import cross_entropy, norm
from slimtune.engine.structure import Norm

__all__ = ["head_loss", "head_loss_and_grad", "loss_and_grad_of_chunk", "token_log_probs"]


def head_loss_and_grad(
    x: Tensor,
    residual: Tensor,
    final_norm: Norm,
    head: Tensor,
    rows: Tensor,
    targets: Tensor,
    chunk: int,
    g: Tensor,
    *,
    softcap: float | None = None,
    in_fp8: Fp8Head | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of the supervised tokens' negative log-likelihoods, float32; its gradient is written into ``g``.

    Args:
        x: [T, H], the last layer's result as a pair to be added:
        residual: [T, H].
        final_norm: Before the head.
        head: [V, H].
        rows: int64 [n], the supervised tokens.
        targets: int64 [n], what follows each of them.
        chunk: Rows to normalise and project at once.
        g: [T, H]; becomes the gradient of x + residual, zero in the rows without supervision.
        softcap: Logits are softcap x tanh(logits / softcap).
        in_fp8: The head, where its way back is multiplied in FP8 (unless that is off).
        weights: [n], what each token's gradient is multiplied with; None: all count alike. The sum is of all alike.
    """
    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    g.zero_()
    if rows.numel() == 0:
        return total
    width = head.shape[0] if in_fp8 is None else in_fp8.width
    buffer = torch.empty(min(chunk, rows.numel()), width, dtype=x.dtype, device=x.device)
    for start in range(0, rows.numel(), chunk):
        places = rows[start : start + chunk]
        y, s, rstd = _normed(x, residual, final_norm, places)
        part = targets[start : start + chunk]
        total += loss_and_grad_of_chunk(
            y, head, part, buffer[: y.shape[0]], before=start, softcap=softcap, in_fp8=in_fp8
        )
        dx = norm.norm_backward(y, s, final_norm.weight, rstd, centred=final_norm.centred, out=y)
        if weights is not None:
            dx *= weights[start : start + chunk, None].to(dx.dtype)
        g.index_copy_(0, places, dx)
    return total


def loss_and_grad_of_chunk(
    y: Tensor,
    head: Tensor,
    targets: Tensor,
    buffer: Tensor,
    *,
    before: int = 0,
    softcap: float | None = None,
    in_fp8: Fp8Head | None = None,
) -> Tensor:
    """Sum of a chunk's negative log-likelihoods; ``y`` becomes its gradient.

    Args:
        y: [n, H], what the head multiplies.
        head: [V, H].
        targets: int64 [n].
        buffer: [n, V or more], for logits and their gradient.
        before: Supervised tokens of the micro-batch before these: in FP8 a row's rounding depends on its place.
        softcap: As :func:`head_loss_and_grad`.
        in_fp8: Likewise.
    """
    logits = torch.mm(y, head.t(), out=buffer[:, : head.shape[0]])
    if in_fp8 is not None and in_fp8.switch.on:
        return in_fp8.loss_and_grad(buffer, targets, y, before=before, softcap=softcap)
    loss = cross_entropy.loss_and_grad_(logits, targets, 1.0, softcap=softcap)
    torch.mm(logits, head, out=y)
    return loss


def head_loss(
    x: Tensor,
    residual: Tensor,
    final_norm: Norm,
    head: Tensor,
    rows: Tensor,
    targets: Tensor,
    chunk: int,
    *,
    softcap: float | None = None,
) -> Tensor:
    """As :func:`head_loss_and_grad`, without a gradient."""
    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if rows.numel() == 0:
        return total
    for start in range(0, rows.numel(), chunk):
        y, _, _ = _normed(x, residual, final_norm, rows[start : start + chunk])
        logits = torch.mm(y, head.t())
        total += cross_entropy.loss_and_grad_(logits, targets[start : start + chunk], 1.0, softcap=softcap)
    return total


def _normed(x: Tensor, residual: Tensor, final_norm: Norm, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return norm.norm_forward(
        x.index_select(0, rows),
        final_norm.weight,
        final_norm.eps,
        residual=residual.index_select(0, rows),
        centred=final_norm.centred,
    )


class _TokenLogProbs(torch.autograd.Function):
    """log p(target) and entropy of each row, differentiable in the hidden states.

    The first one's gradient is made in the forward pass; the entropy's, which few losses have, from logits made anew.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        n = hidden.shape[0]
        log_probs, entropy = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(2))
        is_top1 = torch.empty(n, dtype=torch.bool, device=hidden.device)
        slopes = torch.empty_like(hidden) if hidden.requires_grad or ctx.needs_input_grad[0] else None
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            wide, slope = _logits(hidden[rows], head, softcap)
            index = targets[rows, None]
            logsumexp = torch.logsumexp(wide, dim=-1, keepdim=True)
            log_probs[rows] = (wide.gather(1, index) - logsumexp)[:, 0]
            is_top1[rows] = wide.argmax(-1) == targets[rows]
            p = torch.exp(wide - logsumexp)
            entropy[rows] = logsumexp[:, 0] - torch.linalg.vecdot(p, wide)
            if slopes is not None:
                p.neg_().scatter_add_(1, index, torch.ones_like(index, dtype=p.dtype))
                torch.mm((p if slope is None else p * slope).to(hidden.dtype), head, out=slopes[rows])
        ctx.save_for_backward(hidden, head, slopes)
        ctx.chunk, ctx.softcap = chunk, softcap
        ctx.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(
        ctx: Any, g_log_probs: Tensor | None, g_entropy: Tensor | None, _: None
    ) -> tuple[Tensor, None, None, None, None]:
        hidden, head, slopes = ctx.saved_tensors
        dx = torch.zeros_like(slopes) if g_log_probs is None else (slopes * g_log_probs[:, None]).to(slopes.dtype)
        if g_entropy is None:
            return dx, None, None, None, None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            wide, slope = _logits(hidden[rows], head, ctx.softcap)
            log_p = torch.log_softmax(wide, dim=-1)
            p = torch.exp(log_p)
            g = -p * (log_p - torch.linalg.vecdot(p, log_p)[:, None]) * g_entropy[rows, None]
            dx[rows] += ((g if slope is None else g * slope).to(head.dtype) @ head).to(dx.dtype)
        return dx, None, None, None, None


def _logits(hidden: Tensor, head: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits in float32, and what the soft cap multiplies their gradients with, if there is one."""
    logits = torch.mm(hidden, head.t()).float()
    if softcap is None:
        return logits, None
    bent = torch.tanh(logits / softcap)
    return bent * softcap, 1 - bent * bent


def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: log p(target), the distribution's entropy, and whether the target is its most likely token.

    Args:
        hidden: [n, H], after the final norm; log_probs and entropy are differentiable in it.
        head: [V, H], frozen.
        targets: int64 [n].
        chunk: Rows to project at once.
        softcap: Logits are softcap x tanh(logits / softcap).

    Returns:
        log_probs float32 [n], entropy float32 [n], is_top1 bool [n].
    """
    result: tuple[Tensor, Tensor, Tensor] = _TokenLogProbs.apply(hidden, head, targets, chunk, softcap)
    return result
