"""The experts' own adapters against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import grouped_lora
from slimtune.engine.kernels.routing import Routes
from tests.engine.kernels.maker import Maker
from tests.engine.kernels.test_grouped import COUNTS, ends_of
from tests.tolerances import assert_close


def routed(make: Maker, counts: tuple[int, ...]) -> tuple[Routes, Tensor]:
    """Rows of one slot each in any order, and each row's expert."""
    ends, expert = ends_of(counts, make.device)
    order = torch.randperm(len(expert), generator=make.generator).to(make.device)
    return Routes(order.int(), order.argsort().int()[:, None], ends, expert[order.argsort()][:, None]), expert


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("rank", "tail", "ones"), [(8, 0, False), (4, 4, True), (24, 8, False)])
def test_down(make: Maker, counts: tuple[int, ...], rank: int, tail: int, ones: bool) -> None:
    routes, expert = routed(make, counts)
    x = make.strided_copy(make(len(expert), 200))
    a = make(len(counts), rank, 200, dtype=torch.float32)
    out = make.strided(len(expert), rank + tail)
    u = grouped_lora.expert_down(x, a, routes, out=out, ones=ones)
    assert u.data_ptr() == out.data_ptr()
    want = torch.einsum("rk,rnk->rn", x.double(), a.to(make.dtype).double()[expert])
    assert_close(u[:, :rank], want, dtype=make.dtype)
    assert (u[:, rank:] == torch.tensor([float(ones)] + [0.0] * (tail - 1))[:tail].to(u)).all()
    assert torch.isnan(out._base[:, rank + tail :]).all(), "wrote outside its columns"


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("rank", [8, 24])
@pytest.mark.parametrize("what", ["da", "weighted da", "dx", "both"])
def test_down_backward_adds_the_gradients(make: Maker, counts: tuple[int, ...], rank: int, what: str) -> None:
    routes, expert = routed(make, counts)
    x, du = make.strided_copy(make(len(expert), 200)), make.strided_copy(make(len(expert), rank))
    a = make(len(counts), rank, 200, dtype=torch.float32)
    weights = make(len(expert), 1, dtype=torch.float32) if what == "weighted da" else None
    rounded = du.double() if weights is None else (du.float() * weights[routes.order.long()]).to(make.dtype).double()
    leaves = x.double().requires_grad_(), a.to(make.dtype).double().requires_grad_()
    torch.einsum("rk,rnk->rn", leaves[0], leaves[1][expert]).backward(rounded)
    da = make(*a.shape, dtype=torch.float32) if what != "dx" else None
    dx = make.strided_copy(make(*x.shape)) if what in ("dx", "both") else None
    want_da = None if da is None else da.double() + leaves[1].grad
    want_dx = None if dx is None else dx.double() + leaves[0].grad
    grouped_lora.expert_down_backward_(du, x, a, routes, da=da, dx=dx, weights=weights)
    if da is not None:
        assert_close(da, want_da, dtype=torch.float32)
    if dx is not None:
        assert_close(dx, want_dx, dtype=make.dtype)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_up_backward_adds_the_gradient(make: Maker, counts: tuple[int, ...], weighted: bool) -> None:
    routes, expert = routed(make, counts)
    dy, u = make.strided_copy(make(len(expert), 200)), make.strided_copy(make(len(expert), 8))
    weights = make(len(expert), 1, dtype=torch.float32) if weighted else None
    rounded = u.double() if weights is None else (u.float() * weights[routes.order.long()]).to(make.dtype).double()
    db = make(len(counts), 200, 8, dtype=torch.float32)
    want = db.double()
    want.index_add_(0, expert, 2.0 * torch.einsum("rn,rk->rnk", dy.double(), rounded))
    grouped_lora.expert_up_backward_(dy, u, routes, 2.0, db=db, weights=weights)
    assert_close(db, want, dtype=torch.float32)
