"""The sort by expert, the rows' gather, their weighted sum and their products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import routing
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

# tokens, slots, experts: several blocks of the sort, one token, one slot, every expert, more experts than pairs.
SHAPES = [(40, 4, 13), (1, 3, 8), (200, 1, 5), (9, 6, 6), (2, 2, 512)]


def choose(make: Maker, tokens: int, slots: int, experts: int, how: str) -> Tensor:
    """int64 [tokens, slots], no expert twice in a token: drawn evenly, or the first ones by all, the others empty."""
    scores = torch.rand(tokens, experts, generator=make.generator)
    if how == "skewed":
        scores[:, :slots] += 1.0
    return scores.topk(slots).indices.to(make.device)


@pytest.fixture(params=[(15, 4, 13), (1, 3, 8), (5, 6, 6)], ids=str)
def routed(request: pytest.FixtureRequest, make: Maker) -> tuple[Tensor, routing.Routes]:
    experts = choose(make, *request.param, how="even")
    return experts, routing.sort_by_expert(experts, request.param[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("how", ["even", "skewed"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_sort_is_torchs_stable_sort(device: str, shape: tuple[int, int, int], how: str, integer: torch.dtype) -> None:
    experts = choose(Maker(device, torch.float32), *shape, how=how).to(integer)
    routes = routing.sort_by_expert(experts, shape[2])
    flat = experts.flatten().cpu()
    values, order = flat.sort(stable=True)
    assert {x.dtype for x in (routes.order, routes.place, routes.ends)} == {torch.int32}
    assert torch.equal(routes.order.cpu(), order.int())
    assert torch.equal(routes.place.cpu().flatten()[order], torch.arange(len(flat), dtype=torch.int32))
    ends = torch.searchsorted(values, torch.arange(shape[2], dtype=flat.dtype), right=True)
    assert torch.equal(routes.ends.cpu(), ends.int())
    assert routes.ends.is_contiguous()


@pytest.mark.parametrize("size", [2560, 80])
@pytest.mark.parametrize("weighted", [False, True])
def test_gather(make: Maker, routed: tuple[Tensor, routing.Routes], size: int, weighted: bool) -> None:
    experts, routes = routed
    x = make.strided_copy(make(experts.shape[0], size))
    weights = make(*experts.shape, dtype=torch.float32) if weighted else None
    out = make.strided(experts.numel(), size)
    rows = routing.gather_rows(x, routes, weights=weights, out=out)
    assert rows.data_ptr() == out.data_ptr()
    pair = routes.order.long()
    want = x.double()[pair // experts.shape[1]]
    if weights is None:
        assert torch.equal(rows, want.to(make.dtype))
    else:
        assert_close(rows, want * weights.double().flatten()[pair, None], dtype=make.dtype)
    assert torch.isnan(out._base[:, size:]).all(), "wrote outside its columns"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_combine_is_the_gathers_transpose(
    make: Maker, routed: tuple[Tensor, routing.Routes], weighted: bool, added: bool
) -> None:
    experts, routes = routed
    tokens, size = experts.shape[0], 80
    rows = make.strided_copy(make(experts.numel(), size))
    weights = make(*experts.shape) if weighted else None
    addend = make.strided_copy(make(tokens, size)) if added else None
    leaf = torch.zeros(tokens, size, dtype=torch.float64, device=make.device, requires_grad=True)
    gathered = leaf[routes.order.long() // experts.shape[1]]
    if weights is not None:
        gathered = gathered * weights.double().flatten()[routes.order.long(), None]
    gathered.backward(rows.double())
    want = leaf.grad if addend is None else leaf.grad + addend.double()
    out = make.strided(tokens, size) if addend is None else addend
    y = routing.combine(rows, routes, weights=weights, addend=addend, out=out)
    assert y.data_ptr() == out.data_ptr()
    assert_close(y, want, dtype=make.dtype)
    assert torch.isnan(out._base[:, size:]).all(), "wrote outside its columns"


@pytest.mark.parametrize("size", [2560, 80])
def test_row_dot_is_the_weights_gradient(make: Maker, routed: tuple[Tensor, routing.Routes], size: int) -> None:
    experts, routes = routed
    a, b = (make.strided_copy(make(experts.numel(), size)) for _ in range(2))
    products = routing.row_dot(a, b, routes)
    assert products.dtype == torch.float32
    assert_close(products, (a.double() * b.double()).sum(1)[routes.place.long()], dtype=torch.float32)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    """Sort, gather and sum are recorded as a graph, and the replay follows other experts."""
    make = Maker("cuda", torch.bfloat16)
    x, weights = make(300, 64), make(300, 4, dtype=torch.float32)
    experts = choose(make, 300, 4, 16, "even")

    def there_and_back() -> Tensor:
        routes = routing.sort_by_expert(experts, 16)
        return routing.combine(routing.gather_rows(x, routes), routes, weights=weights)

    there_and_back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = there_and_back()
    for how in ("skewed", "even"):
        experts.copy_(choose(make, 300, 4, 16, how))
        graph.replay()
        assert_close(y, x.double() * weights.double().sum(1, keepdim=True), dtype=torch.bfloat16)
