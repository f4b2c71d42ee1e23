"""The flat 8-bit AdamW; beside bitsandbytes' optimizer where it is installed, else torch's fused one in 32 bits."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from bench import Case, main

from slimtune.engine.kernels import adamw8bit, reference


def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if find_spec("bitsandbytes"):
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-3)
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def cases() -> Iterator[Case]:
    for layers, hidden, rank, modules in ((24, 2048, 8, 4), (24, 2048, 16, 7)):
        sizes = [rank * hidden] * (2 * layers * modules)
        _, total = adamw8bit.aligned_offsets(sizes)
        weights, grads = torch.randn(total, device="cuda"), torch.randn(total, device="cuda")
        state = adamw8bit.AdamWState.zeros(sizes, "cuda")
        scalars = {
            "lr": torch.tensor(1e-3, device="cuda"),
            "step": torch.tensor(3, device="cuda"),
            "grad_scale": torch.tensor(0.5, device="cuda"),
            "skip": torch.tensor(False, device="cuda"),
        }
        parameters = [torch.nn.Parameter(weights[:size].view(rank, -1).clone()) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        theirs = optimizer(parameters)

        def run(step, weights=weights, grads=grads, scalars=scalars, sizes=sizes):
            copy, state = weights.clone(), adamw8bit.AdamWState.zeros(sizes, "cuda")
            for _ in range(2):
                step(copy, grads, state, **scalars)
            return torch.cat((copy - weights, state.map2[state.codes2.int()] * 1e-3))

        yield Case(
            f"adamw {total / 1e6:.1f} M parameters in {len(sizes)} tensors",
            lambda w=weights, g=grads, s=state, k=scalars: adamw8bit.adamw_step_(w, g, s, **k),
            theirs.step,
            total * 16,
            lambda run=run: run(adamw8bit.adamw_step_),
            lambda run=run: run(reference.adamw_step_),
            bound=0.02,  # a code more or less where a moment lies in the middle of two
        )


if __name__ == "__main__":
    main(cases)
