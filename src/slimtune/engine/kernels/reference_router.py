"""A router's choice of experts in plain torch, by the rules of :mod:`slimtune.engine.kernels.reference`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimtune.engine.kernels.reference import _wide as wide

__all__ = ["Choice", "choose", "choose_backward"]


@dataclass(frozen=True)
class Choice:
    """How a router makes weights of its logits.

    Attributes:
        k: Experts to a token.
        score: What is made of the logits: softmax over all experts, or each one's sigmoid.
        renormalise: Divide the chosen scores by their sum (plus ``epsilon``). For softmax it is the same as softmax
            over the chosen logits alone.
        scaling: What the weights are multiplied with.
        groups: Equal groups of neighbouring experts.
        kept_groups: Groups that may be chosen from: those with the best sum of their ``group_best`` best.
        group_best: 1 or 2.
        epsilon: Keeps a sum of scores from being zero.
    """

    k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scaling: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 2
    epsilon: float = 0.0

    def group_size(self, experts: int) -> int:
        """Experts to a group.

        Raises:
            ValueError: The groups aren't equal, or hold too few experts for the choice.
        """
        size = experts // self.groups
        if size * self.groups != experts or self.group_best not in (1, 2):
            raise ValueError(
                f"{experts} experts don't make {self.groups} groups judged by their {self.group_best} best"
            )
        if not self.k <= self.kept_groups * size or not 0 < self.kept_groups <= self.groups:
            raise ValueError(f"{self.kept_groups} of {self.groups} groups of {size} experts don't hold {self.k}")
        if self.kept_groups < self.groups and size < self.group_best:
            raise ValueError(f"a group of {size} has no {self.group_best} best")
        return size


def _scores(logits: Tensor, choice: Choice) -> Tensor:
    z = wide(logits)
    return torch.softmax(z, dim=-1) if choice.score == "softmax" else torch.sigmoid(z)


def choose(
    logits: Tensor, choice: Choice, *, bias: Tensor | None = None, expert_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's experts, the best first, and their weights.

    Of equal scores the lower expert's is better. A score that isn't a number is the worst, and stays none as a weight.

    Args:
        logits: [T, E].
        choice: The rule.
        bias: [E], added to the scores for the choice, not for the weights (DeepSeek-V3's correction).
        expert_scale: [E], what an expert's weight is multiplied with at last (Gemma 4).

    Returns:
        Weights [T, k], float32 (float64 for float64); experts int32 [T, k].
    """
    (tokens, count), size = logits.shape, choice.group_size(logits.shape[1])
    scores = _scores(logits, choice)
    ranked = (scores if bias is None else scores + bias).nan_to_num(nan=-torch.inf)
    if choice.kept_groups < choice.groups:
        groups = ranked.view(tokens, choice.groups, size)
        best = groups.topk(choice.group_best, dim=-1).values.sum(-1)
        left_out = best.sort(dim=-1, descending=True, stable=True).indices[:, choice.kept_groups :]
        closed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, left_out, value=True)
        ranked = groups.masked_fill(closed[..., None], -torch.inf).view(tokens, count)
    experts = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : choice.k]
    weights = scores.gather(1, experts)
    if choice.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + choice.epsilon)
    weights = weights * choice.scaling
    if expert_scale is not None:
        weights = weights * wide(expert_scale)[experts]
    return weights, experts.int()


def choose_backward(
    dw: Tensor, logits: Tensor, experts: Tensor, choice: Choice, *, expert_scale: Tensor | None = None
) -> Tensor:
    """dlogits [T, E], in the logits' dtype, of :func:`choose`; the choice itself has no gradient.

    Args:
        dw: [T, k], the weights' gradient.
        logits: [T, E], as the forward took them.
        experts: int32 [T, k], as the forward gave them.
        choice: The forward's.
        expert_scale: The forward's.
    """
    index, scores = experts.long(), _scores(logits, choice)
    d = wide(dw) * choice.scaling
    if expert_scale is not None:
        d = d * wide(expert_scale)[index]
    if choice.renormalise:
        chosen = scores.gather(1, index)
        total = chosen.sum(-1, keepdim=True) + choice.epsilon
        d = (d - (d * chosen / total).sum(-1, keepdim=True)) / total
    dscores = torch.zeros_like(scores).scatter_(1, index, d.to(scores.dtype))
    if choice.score == "softmax":
        dlogits = scores * (dscores - (dscores * scores).sum(-1, keepdim=True))
    else:
        dlogits = dscores * scores * (1 - scores)
    return dlogits.to(logits.dtype)
