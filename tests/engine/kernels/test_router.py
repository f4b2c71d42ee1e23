"""The router's choice against its float64 reference, and the reference against Transformers' own routers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import reference_router, router
from slimtune.engine.kernels.router import Choice
from tests.engine.kernels.conftest import INTERPRETED
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

CHOICES = {
    "renormalised": (128, Choice(8)),
    "over all": (61, Choice(3, renormalise=False)),
    "one, over all": (6, Choice(1, renormalise=False)),
    "every expert": (6, Choice(6)),
    "sigmoid": (13, Choice(4, score="sigmoid", scaling=2.5, epsilon=1e-20)),
    "sigmoid alone": (300, Choice(10, score="sigmoid", renormalise=False)),
    "groups": (32, Choice(6, score="sigmoid", groups=8, kept_groups=3, epsilon=1e-20)),
    "uneven groups": (15, Choice(4, groups=3, kept_groups=2, group_best=1, renormalise=False, scaling=16.0)),
}


@pytest.fixture(params=CHOICES.values(), ids=list(CHOICES))
def case(request: pytest.FixtureRequest, make: Maker) -> tuple[Tensor, Choice, dict[str, Tensor | None]]:
    """Logits with a row stride and no two alike, the rule, its bias and scale."""
    count, choice = request.param
    ranks = torch.rand(9, count, generator=make.generator).argsort(dim=1)  # bfloat16 holds 256 of them apart
    logits = make.strided_copy((ranks.double() / 32.0 - 3.0).to(make.device, make.dtype))
    bias = make(count, dtype=torch.float32, scale=0.1) if choice.score == "sigmoid" else None
    scale = make(count) if choice.k in (1, 8) else None
    return logits, choice, {"bias": bias, "expert_scale": scale}


def test_choice(make: Maker, case: tuple[Tensor, Choice, dict[str, Tensor | None]]) -> None:
    logits, choice, extra = case
    weights, experts = router.choose(logits, choice, **extra)
    wide = {name: None if x is None else x.double() for name, x in extra.items()}
    want_weights, want_experts = reference_router.choose(logits.double(), choice, **wide)
    assert experts.dtype == torch.int32
    assert torch.equal(experts, want_experts)
    assert weights.dtype == torch.float32
    assert_close(weights, want_weights, dtype=torch.float32)


def test_backward_is_the_gradient(make: Maker, case: tuple[Tensor, Choice, dict[str, Tensor | None]]) -> None:
    logits, choice, extra = case
    scale = extra["expert_scale"]
    weights, experts = router.choose(logits, choice, **extra)
    dw = make(*weights.shape, dtype=torch.float32)
    leaf = logits.double().requires_grad_()
    scores = leaf.softmax(-1) if choice.score == "softmax" else leaf.sigmoid()
    w = scores.gather(1, experts.long())
    if choice.renormalise:
        w = w / (w.sum(1, keepdim=True) + choice.epsilon)
    w = w * choice.scaling * (1.0 if scale is None else scale.double()[experts.long()])
    w.backward(dw.double())
    dlogits = router.choose_backward(dw, logits, experts, choice, expert_scale=scale)
    assert dlogits.dtype == make.dtype
    assert_close(dlogits, leaf.grad, dtype=make.dtype)


def test_of_equal_scores_the_lower_expert(device: str) -> None:
    logits = torch.zeros(2, 20, device=device)
    logits[:, 7] = 1.0
    _, experts = router.choose(logits, Choice(4))
    assert experts.tolist() == [[7, 0, 1, 2]] * 2


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_no_number_chooses_an_expert_and_shows(device: str, score: Any) -> None:
    logits = torch.full((1, 12), float("nan"), device=device)
    weights, experts = router.choose(logits, Choice(4, score=score))
    assert weights.isnan().all()
    assert ((experts >= 0) & (experts < 12)).all()


@pytest.mark.parametrize(
    "choice", [Choice(4, groups=3), Choice(4, groups=4, kept_groups=1), Choice(1, groups=8, kept_groups=2)]
)
def test_impossible_groups_are_refused(device: str, choice: Choice) -> None:
    with pytest.raises(ValueError, match="group"):
        router.choose(torch.zeros(1, 8, device=device), choice)


COUNT = 16
COMMON = {"hidden_size": COUNT, "num_experts_per_tok": 4, "num_experts": COUNT, "num_local_experts": COUNT}
GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
OF_TRANSFORMERS = {
    "qwen3_moe.Qwen3Moe": ({"norm_topk_prob": True}, Choice(4)),
    "olmoe.Olmoe": ({"norm_topk_prob": False}, Choice(4, renormalise=False)),
    "mixtral.Mixtral": ({}, Choice(4)),
    "gpt_oss.GptOss": ({}, Choice(4)),
    "granitemoe.GraniteMoe": ({}, Choice(4)),
    "deepseek_v3.DeepseekV3": (
        {"n_routed_experts": COUNT} | GROUPED,
        Choice(4, "sigmoid", scaling=2.5, groups=4, kept_groups=2, epsilon=1e-20),
    ),
    "glm4_moe.Glm4Moe": (
        {"n_routed_experts": COUNT} | GROUPED | {"n_group": 1, "topk_group": 1},
        Choice(4, "sigmoid", scaling=2.5, epsilon=1e-20),
    ),
}


@pytest.mark.skipif(INTERPRETED, reason="it judges the rules, which hold for the interpreted kernels by test_choice")
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_is_transformers_router(device: str, name: str) -> None:
    """Transformers' router with the identity for a weight: what it is given are its logits."""
    options, choice = OF_TRANSFORMERS[name]
    family, prefix = name.split(".")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    kind = getattr(modeling, f"{prefix}TopKRouter", None) or getattr(modeling, f"{prefix}TopkRouter")
    module = kind(getattr(configuration, f"{prefix}Config")(**COMMON | options)).to(device)
    generator = torch.Generator().manual_seed(0)
    bias = None
    with torch.no_grad():
        module.weight.copy_(torch.eye(COUNT))
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        if choice.score == "sigmoid":
            bias = module.e_score_correction_bias.copy_(torch.rand(COUNT, generator=generator) / 4)
    logits = torch.randn(50, COUNT, generator=generator).to(device).requires_grad_()
    dw = torch.randn(50, 4, generator=generator).to(device)
    outputs = module(logits)  # Granite's has its first and last the other way round in Transformers 5.17
    want_weights, want_experts = outputs[1], next(x for x in outputs if not x.is_floating_point())
    weights, experts = router.choose(logits.detach(), choice, bias=bias)
    # A router may give its experts in any order.
    want_experts, by_expert = want_experts.sort(dim=1)
    experts, ours = experts.long().sort(dim=1)
    assert torch.equal(experts, want_experts)
    want_weights = want_weights.gather(1, by_expert)
    assert_close(weights.gather(1, ours), want_weights.detach(), dtype=torch.float32)
    (want_weights * dw).sum().backward()
    dlogits = router.choose_backward(dw, logits.detach(), experts.int(), choice)
    assert_close(dlogits, logits.grad, dtype=torch.float32)
