"""The flat 8-bit AdamW against bitsandbytes' own optimizer: parameters, state bytes, and the state of small tensors."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import adamw8bit
from slimtune.engine.kernels.adamw8bit import AdamWState, aligned_offsets
from slimtune.engine.kernels.formats import MIN_8BIT, dynamic_map

# LoRA matrices of SmolLM2-135M (the k and v projections' B are small), and sizes that are no multiple of a block.
SHAPES = [(8, 576), (576, 8), (192, 8), (8, 513), (5, 1000), (3, 33)]
SIZES = [rows * columns for rows, columns in SHAPES]
LR = 1e-3


class Flat:
    """Parameters in one buffer, stepped by the kernel."""

    def __init__(self, parameters: list[Tensor], device: str) -> None:
        self.offsets, self.total = aligned_offsets(SIZES)
        self.device = device
        self.params = self.flatten(parameters)
        self.state = AdamWState.zeros(SIZES, device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    def flatten(self, tensors: list[Tensor]) -> Tensor:
        flat = torch.zeros(self.total, device=self.device)
        for offset, tensor in zip(self.offsets, tensors, strict=True):
            flat[offset : offset + tensor.numel()] = tensor.detach().reshape(-1)
        return flat

    def step(self, grads: list[Tensor], **options: object) -> None:
        self.steps += 1
        lr = torch.tensor(LR, device=self.device)
        adamw8bit.adamw_step_(self.params, self.flatten(grads), self.state, lr=lr, step=self.steps, **options)

    def parameter(self, index: int) -> Tensor:
        return self.params[self.offsets[index] :][: SIZES[index]]

    def of_tensor(self, index: int) -> dict[str, Tensor]:
        return self.state.of_tensor(self.offsets[index], SIZES[index])


def draws(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def with_tiny_values(grads: list[Tensor]) -> list[Tensor]:
    """Every seventh column so small beside its block that zero is the nearest code."""
    for grad in grads:
        grad[:, ::7] *= 1e-9
    return grads


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_bitsandbytes_optimizer(device: str, weight_decay: float) -> None:
    """Three steps beside ``AdamW8bit``.

    Both start a step from states that differ in a few codes (its CPU quantiser doesn't always find the nearest code),
    so codes are held to 97 in 100, and what they stand for to two steps of the code, at most a 70th each of the block's
    largest.
    """
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.nn.Parameter(p.to(device)) for p in draws(generator)]
    ours = Flat(theirs, device)
    optimizer = bnb.optim.AdamW8bit(theirs, lr=LR, weight_decay=weight_decay)
    for _ in range(3):
        grads = draws(generator)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.to(device)
        optimizer.step()
        ours.step(grads, weight_decay=weight_decay)

    for index, parameter in enumerate(theirs):
        want, got = optimizer.state[parameter], ours.of_tensor(index)
        moved = (ours.parameter(index) - parameter.detach().view(-1)).abs()
        assert {"state1", "state2"} <= got.keys() <= want.keys()
        if SIZES[index] < MIN_8BIT:
            assert got["state1"].dtype == want["state1"].dtype == torch.float32
            assert torch.allclose(got["state1"], want["state1"].view(-1), rtol=1e-5, atol=1e-7)
            assert torch.allclose(got["state2"], want["state2"].view(-1), rtol=1e-5, atol=1e-9)
            assert moved.max() < 1e-6
            continue
        assert moved.mean() < 0.002 * LR
        assert moved.max() < LR
        for one in "12":
            assert torch.equal(got[f"qmap{one}"].cpu(), want[f"qmap{one}"].cpu())
            assert torch.allclose(got[f"absmax{one}"], want[f"absmax{one}"], rtol=0.02)
            same = got[f"state{one}"] == want[f"state{one}"].view(-1)
            assert same.double().mean() > 0.97
            code = got[f"qmap{one}"]
            apart = code[got[f"state{one}"].int()] - code[want[f"state{one}"].view(-1).int()]
            assert apart.abs().max() < 2 / 70


def test_one_step_from_the_same_state_gives_the_nearest_bytes(device: str) -> None:
    """m and v in float64 from the state before; the bytes are those of the nearest values, found one by one."""
    generator = torch.Generator().manual_seed(1)
    ours, index = Flat(draws(generator), device), 0
    ours.step(with_tiny_values(draws(generator)))
    before = {name: value.clone().cpu() for name, value in ours.of_tensor(index).items()}
    parameter = ours.parameter(index).double().cpu()
    grads = with_tiny_values(draws(generator))
    ours.step(grads)
    after = {name: value.cpu() for name, value in ours.of_tensor(index).items()}

    g = grads[index].view(-1, 256).double()
    moments = []
    for one, beta, new in (("1", 0.9, g), ("2", 0.999, g * g)):
        code = before[f"qmap{one}"].double()
        old = code[before[f"state{one}"].int()].view(-1, 256) * before[f"absmax{one}"].double()[:, None]
        moment = beta * old + (1 - beta) * new
        moments.append(moment)
        absmax = moment.abs().amax(-1)
        assert torch.allclose(after[f"absmax{one}"].double(), absmax, rtol=1e-6)
        nearest = ((moment / absmax[:, None])[..., None] - code).abs().argmin(-1)
        if one == "1":
            assert ((nearest == 127) & (moment < 0)).any()
            nearest -= ((nearest == 127) & (moment < 0)).int()  # a negative moment never becomes zero
        got = after[f"state{one}"].view(-1, 256).int()
        assert (got != nearest).double().mean() < 1e-3, "more than a tie here and there"
        assert (got - nearest).abs().max() <= 1
    m, v = moments
    want = parameter.view(-1, 256) - LR * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    assert torch.allclose(ours.parameter(index).double().cpu(), want.view(-1), rtol=0, atol=2e-7)


def test_maps_are_bitsandbytes() -> None:
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed=signed), bnb.functional.create_dynamic_map(signed=signed))


def test_gradients_are_scaled_from_the_device(device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    start, grads = draws(generator), draws(generator)
    scaled, plain = Flat(start, device), Flat(start, device)
    scaled.step([g * 4 for g in grads], grad_scale=torch.tensor(0.25, device=device))
    plain.step(grads)
    assert torch.equal(scaled.params, plain.params)
    assert torch.equal(scaled.state.codes2, plain.state.codes2)


def test_a_skipped_step_changes_nothing(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    flat = Flat(draws(generator), device)
    flat.step(draws(generator), skip=torch.tensor(False, device=device))
    params, state = flat.params.clone(), {k: v.clone() for k, v in vars(flat.state).items()}
    bad = draws(generator)
    bad[0][0, 0] = float("nan")
    flat.step(bad, skip=torch.tensor(True, device=device))
    assert torch.equal(flat.params, params)
    assert all(torch.equal(value, state[name]) for name, value in vars(flat.state).items())


def test_gaps_between_tensors_stay_zero(device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    flat = Flat(draws(generator), device)
    for _ in range(3):
        flat.step(draws(generator), weight_decay=0.1)
    gap = torch.ones(flat.total, dtype=torch.bool)
    for offset, size in zip(flat.offsets, SIZES, strict=True):
        gap[offset : offset + size] = False
    assert gap.any()
    assert (flat.params.cpu()[gap] == 0).all()


def test_a_block_without_gradient_keeps_the_bytes_it_starts_with(device: str) -> None:
    flat = Flat(draws(torch.Generator().manual_seed(5)), device)
    before = flat.params.clone()
    flat.step([torch.zeros(shape) for shape in SHAPES])
    assert torch.equal(flat.params, before)
    assert not flat.state.codes1.any()
    assert not flat.state.codes2.any()
