"""LoRA's products against float64, the masks' distribution, and that forward and backward draw the same ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import lora, reference
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

# tokens, H, rank, groups: q, k, v together; one adapter; a wide rank; nothing a multiple of a block.
SHAPES = [(37, 576, 8, 3), (130, 200, 16, 1), (19, 328, 5, 2), (21, 136, 64, 2)]
DROPOUTS = [0.0, 0.05, 0.5]


def seed_of(make: Maker, value: int = 2**40 + 17) -> Tensor:
    return torch.tensor(value, device=make.device)


def masks(make: Maker, shape: tuple[int, int], groups: int, dropout: float, seed: Tensor, stream: int) -> list[Tensor]:
    """What each group's input is multiplied with, float64: the mask over the share kept."""
    if dropout == 0.0:
        return [torch.ones(shape, dtype=torch.float64, device=make.device)] * groups
    keeps = reference.dropout_keep(shape, groups, dropout, seed, stream)
    return [keep.double() * reference.dropout_scale(dropout) for keep in keeps]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_forward_and_every_gradient(make: Maker, shape: tuple[int, int, int, int], dropout: float) -> None:
    tokens, size, rank, groups = shape
    ranks, seed, stream = rank * groups, seed_of(make), 3
    x, a = make.strided_copy(make(tokens, size)), make(ranks, size, dtype=torch.float32)
    out = make.strided(tokens, ranks, extra=8)
    u = lora.lora_down(x, a, groups=groups, dropout=dropout, seed=seed, stream=stream, out=out)

    leaf_x, leaf_a = x.double().requires_grad_(), a.to(make.dtype).double().requires_grad_()
    m = masks(make, (tokens, size), groups, dropout, seed, stream)
    want = torch.cat([(leaf_x * mask) @ part.T for mask, part in zip(m, leaf_a.chunk(groups), strict=True)], dim=1)
    assert u.data_ptr() == out.data_ptr()
    assert_close(u, want.detach(), dtype=make.dtype)
    assert torch.isnan(out._base[:, ranks:]).all(), "wrote outside its columns"

    du, dx, da = make(tokens, ranks), make.strided_copy(make(tokens, size)), make(ranks, size, dtype=torch.float32)
    before_dx, before_da = dx.double(), da.double()
    lora.lora_down_backward_(du, x, a, da=da, dx=dx, groups=groups, dropout=dropout, seed=seed, stream=stream)
    want.backward(du.double())
    assert_close(da, before_da + leaf_a.grad, dtype=torch.float32)
    assert_close(dx, before_dx + leaf_x.grad, dtype=make.dtype)


@pytest.mark.parametrize("dtype", [torch.float32], indirect=True)
def test_large_batches_take_all_groups_in_one_program(make: Maker) -> None:
    tokens, size, rank, groups = 4100, 40, 4, 3
    x, a, seed = make(tokens, size), make(rank * groups, size), seed_of(make)
    u = lora.lora_down(x, a, groups=groups, dropout=0.3, seed=seed)
    m = masks(make, (tokens, size), groups, 0.3, seed, 0)
    parts = zip(m, a.double().chunk(groups), strict=True)
    assert_close(u, torch.cat([(x.double() * mask) @ part.T for mask, part in parts], dim=1), dtype=make.dtype)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_fills_the_columns_after_u_and_copies_x(make: Maker, ones: bool, groups: int) -> None:
    x, a = make(37, 200), make(8 * groups, 200, dtype=torch.float32)
    options = {"groups": groups, "dropout": 0.1, "seed": seed_of(make)}
    out, copy = make.strided(37, 8 * groups + 5, extra=3), make.strided(37, 200)
    lora.lora_down(x, a, **options, out=out, ones=ones, copy=copy)
    assert torch.equal(out[:, : 8 * groups], lora.lora_down(x, a, **options))
    assert (out[:, 8 * groups] == float(ones)).all()
    assert (out[:, 8 * groups + 1 :] == 0).all()
    assert torch.equal(copy, x)
    assert torch.isnan(out._base[:, 8 * groups + 5 :]).all(), "wrote outside its columns"
    assert torch.isnan(copy._base[:, 200:]).all(), "wrote outside its columns"


@pytest.mark.parametrize("outputs", [(256, 128, 128), (128, 256), (40, 24, 24)], ids=str)
def test_outputs_of_several_adapters_side_by_side(make: Maker, outputs: tuple[int, ...]) -> None:
    rank = 5
    dy, u = make.strided_copy(make(70, sum(outputs))), make.strided_copy(make(70, rank * len(outputs)))
    db = make(sum(outputs), rank, dtype=torch.float32)
    want = db.double()
    start = 0
    for index, width in enumerate(outputs):
        part = u[:, index * rank : (index + 1) * rank].double()
        want[start : start + width] += 0.5 * dy[:, start : start + width].double().T @ part
        start += width
    lora.lora_up_backward_(dy, u, 0.5, db=db, outputs=outputs)
    assert_close(db, want, dtype=torch.float32)


def test_the_input_is_copied_on_the_way(make: Maker) -> None:
    x, a = make(37, 200), make(8, 200, dtype=torch.float32)
    copy = make.strided(37, 200)
    u = lora.lora_down(x, a, dropout=0.1, seed=seed_of(make), copy=copy)
    assert torch.equal(copy, x)
    assert torch.equal(u, lora.lora_down(x, a, dropout=0.1, seed=seed_of(make)))


@pytest.mark.parametrize("which", ["da", "dx"])
def test_either_gradient_alone(make: Maker, which: str) -> None:
    x, a, du = make(37, 200), make(8, 200, dtype=torch.float32), make(37, 8)
    both = {"da": torch.zeros_like(a), "dx": torch.zeros_like(x)}
    alone = {"da": None, "dx": None, which: torch.zeros_like(both[which])}
    options = {"dropout": 0.1, "seed": seed_of(make)}
    lora.lora_down_backward_(du, x, a, **both, **options)
    lora.lora_down_backward_(du, x, a, **alone, **options)
    assert torch.equal(alone[which], both[which])


@pytest.mark.parametrize("shape", [(37, 192, 8), (300, 576, 16)])
def test_gradient_of_b(make: Maker, shape: tuple[int, int, int]) -> None:
    tokens, out_features, rank = shape
    dy, u, db = make.strided_copy(make(tokens, out_features)), make(tokens, rank), make(out_features, rank)
    db = db.float()
    want = db.double() + 2.5 * dy.double().T @ u.double()
    lora.lora_up_backward_(dy, u, 2.5, db=db)
    assert_close(db, want, dtype=torch.float32)


def drawn(make: Maker, shape: tuple[int, int], groups: int, dropout: float, seed: Tensor, stream: int = 0) -> Tensor:
    """The masks that the kernel really uses, bool [groups, T, H]: A picks out one column of x at a time."""
    tokens, size = shape
    x = torch.ones(shape, device=make.device, dtype=make.dtype)
    a = torch.eye(size, device=make.device).repeat(groups, 1)
    u = lora.lora_down(x, a, groups=groups, dropout=dropout, seed=seed, stream=stream)
    return u.view(tokens, groups, size).transpose(0, 1) != 0


def test_the_kernel_draws_the_references_masks(make: Maker) -> None:
    seed = seed_of(make, -5)
    got = drawn(make, (50, 40), 3, 0.3, seed, stream=7)
    assert torch.equal(got, torch.stack(reference.dropout_keep((50, 40), 3, 0.3, seed, 7)))


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_masks_are_independent_draws_of_the_right_share(device: str, dropout: float) -> None:
    """Counts within 5 standard deviations: over all elements, rows, columns, and pairs of whatever should differ."""
    shape, groups = (512, 512), 3
    keep = 1.0 - dropout
    one = torch.stack(reference.dropout_keep(shape, groups, dropout, torch.tensor(1, device=device), 0))
    two = torch.stack(reference.dropout_keep(shape, groups, dropout, torch.tensor(2, device=device), 0))
    other = torch.stack(reference.dropout_keep(shape, groups, dropout, torch.tensor(1, device=device), 1))

    def check(kept: Tensor, share: float) -> None:
        """Every row of ``kept`` is a sample of independent draws with this share."""
        n = kept.shape[-1]
        sigma = (share * (1 - share) / n) ** 0.5
        worst = (kept.double().mean(-1) - share).abs().max()
        assert worst < 5.5 * sigma, f"{worst / sigma:.1f} standard deviations"

    check(one.flatten(1), keep)
    check(one.flatten(0, 1), keep)
    check(one.transpose(1, 2).flatten(0, 1), keep)
    both = keep * keep
    check((one & two).flatten(1), both)
    check((one & other).flatten(1), both)
    for shift in (1, 2, 8, 32, 128):
        check((one & one.roll(shift, dims=1)).flatten(1), both)
        check((one & one.roll(shift, dims=2)).flatten(1), both)
    for group in range(1, groups):
        check((one & one.roll(group, dims=0)).flatten(1), both)
    # Rows and columns have keys of their own: no more fours of corners agree than chance has it.
    sign = (one.double() - keep) / (keep * dropout) ** 0.5
    for down, right in ((1, 1), (3, 5), (64, 16)):
        corners = sign * sign.roll(down, 1) * sign.roll(right, 2) * sign.roll((down, right), (1, 2))
        assert (corners.flatten(1).mean(1).abs() * (512 * 512) ** 0.5 < 5).all()


def test_a_step_of_the_seed_changes_the_mask_and_the_same_seed_repeats_it(make: Maker) -> None:
    seed = seed_of(make)
    first = drawn(make, (30, 40), 1, 0.5, seed)
    assert torch.equal(drawn(make, (30, 40), 1, 0.5, seed), first)
    seed.add_(1)
    assert not torch.equal(drawn(make, (30, 40), 1, 0.5, seed), first)


def test_dropout_without_a_seed_is_refused(make: Maker) -> None:
    with pytest.raises(ValueError, match="seed"):
        lora.lora_down(make(3, 40), make(2, 40), dropout=0.1)
