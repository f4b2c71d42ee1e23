"""SwiGLU, forward and backward."""

from collections.abc import Iterator

import torch
from bench import Case, main, random

from slimtune.engine.kernels import mlp, reference_mlp


def cases() -> Iterator[Case]:
    for tokens, inner in ((16384, 5504), (1024, 5504), (8192, 18944)):
        gate, up = random(tokens, 2 * inner).chunk(2, dim=1)
        dh = random(tokens, inner)
        h = torch.empty_like(dh)
        size = dh.numel() * 2

        def eager_backward(gate=gate, up=up, dh=dh):
            g, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
            return torch.autograd.grad(torch.nn.functional.silu(g) * u, (g, u), dh)

        def got(gate=gate, up=up, dh=dh, h=h):
            both = torch.cat((gate, up), dim=1)
            mlp.gated_backward_(dh, *both.chunk(2, dim=1), h=h)
            return torch.cat((both, h), dim=1)[:256]

        def want(gate=gate, up=up, dh=dh):
            both, h = torch.cat((gate, up), dim=1)[:256].double(), dh[:256].double()
            reference_mlp.gated_backward_(dh[:256].double(), *both.chunk(2, dim=1), h=h)
            return torch.cat((both, h), dim=1)

        yield Case(
            f"swiglu forward {tokens}x{inner}",
            lambda g=gate, u=up, h=h: mlp.gated_forward(g, u, out=h),
            lambda g=gate, u=up: torch.nn.functional.silu(g) * u,
            3 * size,
            lambda g=gate, u=up: mlp.gated_forward(g, u)[:256],
            lambda g=gate, u=up: reference_mlp.gated_forward(g[:256].double(), u[:256].double()),
        )
        yield Case(
            f"swiglu backward {tokens}x{inner}, with h",
            # In place again and again: values wander, time doesn't.
            lambda d=dh, g=gate, u=up, h=h: mlp.gated_backward_(d, g, u, h=h),
            eager_backward,
            6 * size,
            got,
            want,
        )


if __name__ == "__main__":
    main(cases)
