"""RMS norm with residual, forward and backward."""

from collections.abc import Iterator

import torch
from bench import Case, main, random

from slimtune.engine.kernels import norm, reference


def cases() -> Iterator[Case]:
    for tokens, hidden in ((16384, 2048), (1024, 2048), (8192, 3584)):
        x, residual, dy, weight = (*(random(tokens, hidden) for _ in range(3)), random(hidden))
        wide = torch.empty(tokens, hidden + 24, dtype=x.dtype, device="cuda")[:, :hidden]
        _, total, rstd = norm.norm_forward(x, weight, 1e-6, residual=residual)
        size = x.numel() * 2

        def eager(x=x, residual=residual, weight=weight):
            s = x + residual
            wide = s.float()
            return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(s.dtype)

        def eager_backward(dy=dy, total=total, weight=weight, residual=residual):
            leaf = total.detach().requires_grad_()
            wide = leaf.float()
            y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(leaf.dtype)
            return torch.autograd.grad(y, leaf, dy)[0] + residual

        yield Case(
            f"norm forward {tokens}x{hidden}, residual, strided",
            lambda x=x, w=weight, r=residual, o=wide: norm.norm_forward(x, w, 1e-6, residual=r, out=o),
            eager,
            4 * size,
            lambda x=x, w=weight, r=residual, o=wide: norm.norm_forward(x, w, 1e-6, residual=r, out=o)[0],
            lambda s=total, w=weight: reference.norm_forward(s.double(), w.double(), 1e-6)[0],
        )
        yield Case(
            f"norm backward {tokens}x{hidden}, residual",
            lambda d=dy, s=total, w=weight, t=rstd, r=residual: norm.norm_backward(d, s, w, t, dresidual=r),
            eager_backward,
            4 * size,
            lambda d=dy, s=total, w=weight, t=rstd, r=residual: norm.norm_backward(d, s, w, t, dresidual=r),
            lambda d=dy, s=total, w=weight, t=rstd, r=residual: reference.norm_backward(
                d.double(), s.double(), w.double(), t.double(), dresidual=r.double()
            ),
        )


if __name__ == "__main__":
    main(cases)
