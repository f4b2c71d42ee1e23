"""LoRA's skinny products with dropout, forward and backward; beside nn.functional.dropout and cuBLAS."""

from collections.abc import Iterator

import torch
from bench import Case, main, random

from slimtune.engine.kernels import lora, reference


def cases() -> Iterator[Case]:
    seed = torch.tensor(7, device="cuda")
    for tokens, size, rank, groups, dropout in (
        (16384, 2048, 8, 3, 0.05),
        (16384, 2048, 8, 1, 0.05),
        (1024, 2048, 8, 3, 0.05),
        (16384, 2048, 16, 2, 0.0),
        (16384, 5504, 16, 1, 0.0),
        (8192, 3584, 8, 3, 0.05),
    ):
        ranks = rank * groups
        x, dx, du = random(tokens, size), random(tokens, size), random(tokens, ranks)
        a, da = random(ranks, size, dtype=torch.float32), torch.zeros(ranks, size, device="cuda")
        low = a.to(x.dtype)
        options = {"groups": groups, "dropout": dropout, "seed": seed}
        what = f"{tokens}x{size} r={rank} x{groups} p={dropout}"

        def eager(x=x, low=low, groups=groups, dropout=dropout):
            return [torch.nn.functional.dropout(x, dropout) @ part.T for part in low.chunk(groups)]

        def eager_backward(x=x, low=low, du=du, groups=groups, dropout=dropout):
            """What autograd would run with the masks at hand: masked x again, two products, a sum for each group."""
            total = None
            for part, d in zip(low.chunk(groups), du.chunk(groups, dim=1), strict=True):
                d.T @ x
                one = torch.nn.functional.dropout(d @ part, dropout)
                total = one if total is None else total + one
            return total

        def gradients(x=x, a=a, du=du, options=options):
            da, dx = torch.zeros_like(a), torch.zeros_like(x)
            lora.lora_down_backward_(du, x, a, da=da, dx=dx, **options)
            return torch.cat((da / da.abs().max(), dx / dx.abs().max()))

        def want_gradients(x=x, low=low, du=du, options=options):
            da, dx = torch.zeros_like(low, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
            reference.lora_down_backward_(du.double(), x.double(), low.double(), da=da, dx=dx, **options)
            return torch.cat((da / da.abs().max(), dx / dx.abs().max()))

        yield Case(
            f"lora down {what}",
            lambda x=x, a=a, o=options: lora.lora_down(x, a, **o),
            eager,
            x.numel() * 2,
            lambda x=x, a=a, o=options: lora.lora_down(x, a, **o),
            lambda x=x, a=low, o=options: reference.lora_down(x.double(), a.double(), **o),
        )
        yield Case(
            f"lora down backward {what}",
            lambda d=du, x=x, a=a, g=(da, dx), o=options: lora.lora_down_backward_(d, x, a, da=g[0], dx=g[1], **o),
            eager_backward,
            x.numel() * 6,
            gradients,
            want_gradients,
            bound=9e-3,  # normalised by a rounded maximum
        )
        db = torch.zeros(size, rank, device="cuda")
        u = du[:, :rank]
        yield Case(
            f"lora up backward {tokens}x{size} r={rank}",
            lambda y=x, u=u, b=db: lora.lora_up_backward_(y, u, 2.0, db=b),
            lambda y=x, u=u, b=db: b.add_(y.T @ u, alpha=2.0),
            x.numel() * 2,
        )


if __name__ == "__main__":
    main(cases)
