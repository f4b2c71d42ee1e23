"""A mixture of experts of Qwen3-30B-A3B's shape: router, rows, products, adapters; even routing and uneven."""

from collections.abc import Iterator

import torch
from bench import DEVICE, DTYPE, Case, main, random
from torch.nn import functional

from slimtune.engine.kernels import (
    grouped,
    grouped_lora,
    mlp,
    nf4,
    reference_experts,
    reference_mlp,
    reference_nf4,
    reference_router,
    router,
    routing,
)

TOKENS, SLOTS, EXPERTS, HIDDEN, INNER, RANK = 8192, 8, 128, 2048, 768, 16
ROWS = TOKENS * SLOTS
CHOICE = router.Choice(SLOTS)


def logits_of(how: str) -> torch.Tensor:
    """Random, or with a few experts that most tokens choose and half of them that none does."""
    logits = random(TOKENS, EXPERTS)
    if how == "uneven":
        logits[:, :4] += 4.0
        logits[:, EXPERTS // 2 :] -= 20.0
    return logits


def cases() -> Iterator[Case]:
    x = random(TOKENS, HIDDEN)
    for how in ("even", "uneven"):
        logits = logits_of(how)
        weights, experts = router.choose(logits, CHOICE)
        routes = routing.sort_by_expert(experts, EXPERTS)
        if how == "even":
            yield from routers(logits, weights, experts)
            yield from rows_of(x, weights, routes)
        yield from products(x, routes, how)
        yield from adapters(x, routes, how)
    yield from dequantised()


def routers(logits: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> Iterator[Case]:
    def eager(logits: torch.Tensor) -> torch.Tensor:
        values = torch.topk(functional.softmax(logits, dtype=torch.float, dim=-1), SLOTS, dim=-1)[0]
        return values / values.sum(-1, keepdim=True)

    def eager_backward() -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(eager(leaf), leaf, weights)[0]

    size = logits.numel() * 2
    yield Case(
        f"choose {SLOTS} of {EXPERTS}, {TOKENS} tokens",
        lambda: router.choose(logits, CHOICE),
        lambda: eager(logits),
        size + weights.numel() * 8,
        lambda: router.choose(logits, CHOICE)[0],
        lambda: reference_router.choose(logits.double(), CHOICE)[0],
    )
    yield Case(
        f"choose backward {SLOTS} of {EXPERTS}",
        lambda: router.choose_backward(weights, logits, experts, CHOICE),
        eager_backward,
        2 * size + weights.numel() * 8,
        lambda: router.choose_backward(weights, logits, experts, CHOICE),
        lambda: reference_router.choose_backward(weights.double(), logits.double(), experts, CHOICE),
    )
    yield Case(
        f"sort {ROWS} rows by expert",
        lambda: routing.sort_by_expert(experts, EXPERTS),
        lambda: reference_experts.sort_by_expert(experts, EXPERTS),
        ROWS * 12,
        lambda: routing.sort_by_expert(experts, EXPERTS).order,
        lambda: reference_experts.sort_by_expert(experts, EXPERTS).order,
        bound=0.0,
        launches=4,
    )


def rows_of(x: torch.Tensor, weights: torch.Tensor, routes: routing.Routes) -> Iterator[Case]:
    rows = random(ROWS, HIDDEN + RANK)[:, :HIDDEN]
    size = ROWS * HIDDEN * 2
    few = 256
    yield Case(
        f"gather {ROWS}x{HIDDEN}",
        lambda: routing.gather_rows(x, routes, out=rows),
        lambda: x[routes.order // SLOTS],
        size + x.numel() * 2,
        lambda: routing.gather_rows(x, routes, weights=weights)[:few],
        lambda: reference_experts.gather_rows(x.double(), routes, weights=weights)[:few],
    )
    yield Case(
        f"combine {ROWS}x{HIDDEN}, with addend",
        lambda: routing.combine(rows, routes, weights=weights, addend=x),
        lambda: (rows[routes.place] * weights[..., None]).sum(1).to(DTYPE) + x,
        size + x.numel() * 4,
        lambda: routing.combine(rows, routes, weights=weights, addend=x)[:few],
        lambda: reference_experts.combine(rows.double(), routes, weights=weights, addend=x.double())[:few],
    )
    gates, dh = random(ROWS, 2 * INNER), random(ROWS, INNER)
    dw = torch.empty_like(weights)

    def got() -> torch.Tensor:
        both = gates.clone()
        mlp.gated_backward_(dh, *both.chunk(2, dim=1), routes=routes, weights=weights, dw=dw)
        return torch.cat((both, dw.view(-1, 1)[routes.order]), dim=1)

    def want() -> torch.Tensor:
        both, dw = gates.double(), weights.double()
        reference_mlp.gated_backward_(
            dh.double(), *both.chunk(2, dim=1), routes=routes, weights=weights, dw=dw
        )  # fmt: skip
        return torch.cat((both, dw.view(-1, 1)[routes.order]), dim=1)

    def eager() -> tuple[torch.Tensor, ...]:
        leaves = [half.detach().requires_grad_() for half in gates.chunk(2, dim=1)]
        h = functional.silu(leaves[0]) * leaves[1]
        return torch.autograd.grad(h * weights.view(-1, 1)[routes.order].to(DTYPE), leaves, dh)

    run = gates.clone().chunk(2, dim=1)
    yield Case(
        f"gated backward {ROWS}x{INNER}, with weights",
        lambda: mlp.gated_backward_(dh, *run, routes=routes, weights=weights, dw=dw),
        eager,
        ROWS * INNER * 10,
        got,
        want,
    )


def products(x: torch.Tensor, routes: routing.Routes, how: str) -> Iterator[Case]:
    """Ours beside torch's, both ways, where torch's is what is taken: how much it is worth to have both."""
    rows = routing.gather_rows(x, routes)
    stack = random(EXPERTS, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5)
    dy = random(ROWS, 2 * INNER)
    for name, mine, taken, operand, columns in (
        ("forward", False, grouped.grouped_forward, rows, 2 * INNER),
        ("backward", True, grouped.grouped_backward, dy, HIDDEN),
    ):
        wanted = reference_experts.grouped_backward if mine else reference_experts.grouped_forward
        yield Case(
            f"grouped {name} {how}, Triton beside what is taken",
            lambda o=operand, c=columns, b=mine: grouped._launch(o, stack, routes.ends, c, backward=b),
            lambda o=operand, t=taken: t(o, stack, routes.ends),
            (operand.numel() + stack.numel() + ROWS * columns) * 2,
            lambda o=operand, c=columns, b=mine: grouped._launch(o, stack, routes.ends, c, backward=b),
            lambda o=operand, w=wanted: w(o, stack, routes.ends),
            bound=1e-2,
        )


def adapters(x: torch.Tensor, routes: routing.Routes, how: str) -> Iterator[Case]:
    rows = routing.gather_rows(x, routes)
    a = random(EXPERTS, RANK, HIDDEN, dtype=torch.float32, scale=HIDDEN**-0.5)
    da, dx, du = torch.zeros_like(a), torch.zeros_like(rows), random(ROWS, RANK)

    def got() -> torch.Tensor:
        sums = torch.zeros_like(a)
        grouped_lora.expert_down_backward_(du, rows, a, routes, da=sums, dx=None)
        return sums

    def want() -> torch.Tensor:
        sums = torch.zeros_like(a, dtype=torch.float64)
        reference_experts.expert_down_backward_(du.double(), rows.double(), a.double(), routes, da=sums, dx=None)
        return sums

    def eager_down() -> torch.Tensor:
        return reference_experts.grouped_forward(rows, a.to(DTYPE), routes.ends)

    yield Case(
        f"expert down {how}, rank {RANK}",
        lambda: grouped_lora.expert_down(rows, a, routes),
        eager_down,
        rows.numel() * 2,
        lambda: grouped_lora.expert_down(rows, a, routes),
        lambda: reference_experts.expert_down(rows.double(), a.to(DTYPE).double(), routes),
    )
    yield Case(
        f"expert down backward {how}, rank {RANK}",
        lambda: grouped_lora.expert_down_backward_(du, rows, a, routes, da=da, dx=dx),
        lambda: reference_experts.grouped_backward(du, a.to(DTYPE), routes.ends),
        rows.numel() * 6,
        got,
        want,
    )


def dequantised() -> Iterator[Case]:
    shape = (2 * INNER, HIDDEN)
    blocks = shape[0] * shape[1] // 64
    packed = torch.randint(256, (EXPERTS, blocks * 32), dtype=torch.uint8, device=DEVICE)
    absmax = torch.randint(256, (EXPERTS, blocks), dtype=torch.uint8, device=DEVICE)
    nested = nf4.NestedScales(
        torch.rand(EXPERTS, -(-blocks // 256), device=DEVICE),
        torch.linspace(-1, 1, 256, device=DEVICE),
        torch.rand(EXPERTS, device=DEVICE),
    )
    out = torch.empty(EXPERTS, shape[0], shape[1] + RANK, dtype=DTYPE, device=DEVICE)[..., : shape[1]]
    options = {"shape": shape, "dtype": DTYPE, "nested": nested}
    yield Case(
        f"nf4 {EXPERTS}x{shape[0]}x{shape[1]}, strided",
        lambda: nf4.dequantize_stack(packed, absmax, **options, out=out),
        lambda: reference_nf4.dequantize_stack(packed, absmax, **options),
        out.numel() * 5 // 2 + absmax.numel(),
        lambda: nf4.dequantize_stack(packed, absmax, **options),
        lambda: reference_nf4.dequantize_stack(packed, absmax, **options),
        bound=0.0,
    )


if __name__ == "__main__":
    main(cases)
