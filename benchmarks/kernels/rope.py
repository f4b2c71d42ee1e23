"""The rotation in place, attention's merged gradient, and Qwen3's head norms."""

from collections.abc import Iterator

import torch
from bench import Case, main, random

from slimtune.engine.kernels import reference, rope


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def cases() -> Iterator[Case]:
    for tokens, heads, kv, dim in ((16384, 16, 16, 128), (1024, 16, 16, 128), (8192, 28, 4, 128)):
        q, k, _ = random(tokens, heads + 2 * kv, dim).split((heads, kv, kv), dim=1)
        dq, dk, dv = random(tokens, heads, dim), random(tokens, kv, dim), random(tokens, kv, dim)
        weight = random(dim)
        angles = torch.rand(2048, dim // 2, device="cuda")
        cos, sin, ids = angles.cos(), angles.sin(), torch.arange(tokens, device="cuda") % 2048
        c, s = (torch.cat((t, t), -1).to(q.dtype)[ids][:, None] for t in (cos, sin))
        out = torch.empty(tokens, heads + 2 * kv, dim, dtype=q.dtype, device="cuda")
        size, what = tokens * dim * 2, f"{tokens} tokens, {heads}/{kv} heads of {dim}"

        def rotated(q=q, k=k, cos=cos, sin=sin, ids=ids):
            q, k = q.clone(), k.clone()
            rope.rope_(q, k, cos, sin, ids)
            return torch.cat((q, k), dim=1)

        def want(q=q, k=k, cos=cos, sin=sin, ids=ids):
            q, k = q.double(), k.double()
            reference.rope_(q, k, cos.double(), sin.double(), ids)
            return torch.cat((q, k), dim=1)

        yield Case(
            f"rope {what}",
            lambda q=q, k=k, t=(cos, sin, ids): rope.rope_(q, k, *t),
            lambda q=q, k=k, c=c, s=s: (rotate(q, c, s), rotate(k, c, s)),
            2 * size * (heads + kv),
            rotated,
            want,
        )
        yield Case(
            f"merge qkv grad {what}",
            lambda a=(dq, dk, dv, cos, sin, ids), o=out: rope.merge_qkv_grad(*a, out=o),
            lambda dq=dq, dk=dk, dv=dv, c=c, s=s: torch.cat((rotate(dq, c, -s), rotate(dk, c, -s), dv), dim=1),
            2 * size * (heads + 2 * kv),
            lambda a=(dq, dk, dv, cos, sin, ids), o=out: rope.merge_qkv_grad(*a, out=o),
            lambda a=(dq, dk, dv, cos, sin), i=ids: reference.merge_qkv_grad(*(t.double() for t in a), i),
        )
        norms = (q, k, weight, weight, 1e-6, cos, sin, ids)
        rstd = rope.qk_norm_rope(*norms)[2]
        yield Case(
            f"head norms {what}",
            lambda n=norms: rope.qk_norm_rope(*n),
            lambda q=q, k=k, w=weight, c=c, s=s: [
                rotate(torch.nn.functional.rms_norm(x, x.shape[-1:], w, 1e-6), c, s) for x in (q, k)
            ],
            2 * size * (heads + kv),
        )

        def eager_backward(q=q, k=k, dq=dq, dk=dk, dv=dv, w=weight, c=c, s=s):
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            y = [rotate(torch.nn.functional.rms_norm(x, x.shape[-1:], w, 1e-6), c, s) for x in leaves]
            return torch.cat((*torch.autograd.grad(y, leaves, (dq, dk)), dv), dim=1)

        args = (dq, dk, dv, q, k, weight, weight, rstd, cos, sin)
        yield Case(
            f"head norms backward {what}",
            lambda a=args, i=ids, o=out: rope.qk_norm_rope_backward(*a, i, out=o),
            eager_backward,
            size * (3 * heads + 5 * kv),
            lambda a=args, i=ids, o=out: rope.qk_norm_rope_backward(*a, i, out=o),
            lambda a=args, i=ids: reference.qk_norm_rope_backward(*(t.double() for t in a), i),
        )


if __name__ == "__main__":
    main(cases)
