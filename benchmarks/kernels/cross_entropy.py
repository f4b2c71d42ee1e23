"""Loss and gradient of a chunk of logits."""

from collections.abc import Iterator

import torch
from bench import Case, main, random

from slimtune.engine.kernels import cross_entropy, reference


def cases() -> Iterator[Case]:
    for rows, vocabulary in ((4096, 151936), (1024, 151936), (4096, 49152)):
        logits = random(rows, vocabulary, scale=3.0)
        targets = torch.randint(vocabulary, (rows,), device="cuda")
        scale = torch.tensor(1.0, device="cuda")

        def eager(logits=logits, targets=targets):
            leaf = logits.detach().requires_grad_()
            return torch.autograd.grad(torch.nn.functional.cross_entropy(leaf.float(), targets), leaf)

        def got(logits=logits, targets=targets, scale=scale):
            copy = logits[:64].clone()
            cross_entropy.loss_and_grad_(copy, targets[:64], scale)
            return copy

        def want(logits=logits, targets=targets, scale=scale):
            copy = logits[:64].double()
            reference.loss_and_grad_(copy, targets[:64], scale)
            return copy

        yield Case(
            f"cross-entropy {rows}x{vocabulary}",
            lambda z=logits, t=targets, s=scale: cross_entropy.loss_and_grad_(z, t, s),
            eager,
            logits.numel() * 4,
            got,
            want,
        )


if __name__ == "__main__":
    main(cases)
