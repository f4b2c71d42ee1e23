"""Products of rows with their experts' matrices, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.engine.kernels import grouped
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

# Rows of each expert: whole tiles of 16 and parts; some without any; all with one, several tiles of them; one row; one
# expert.
COUNTS = [(16, 1, 31, 0, 16), (0, 20, 0, 3, 0), (0, 0, 70), (0, 1, 0), (33,)]


def ends_of(counts: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """The experts' ends, and each row's expert."""
    each = torch.tensor(counts, device=device)
    return each.cumsum(0).int(), torch.arange(len(counts), device=device).repeat_interleave(each)


@pytest.mark.parametrize(
    ("counts", "shape"), [*((counts, (80, 48)) for counts in COUNTS), ((0, 70, 2), (136, 264))], ids=str
)
def test_forward_and_backward(make: Maker, counts: tuple[int, ...], shape: tuple[int, int]) -> None:
    (k, n), (ends, expert) = shape, ends_of(counts, make.device)
    rows = make.strided_copy(make(len(expert), k))
    weights = make.strided_copy(make(len(counts), n, k))
    y = grouped.grouped_forward(rows, weights, ends)
    assert y.dtype == make.dtype
    assert_close(y, torch.einsum("rk,rnk->rn", rows.double(), weights.double()[expert]), dtype=make.dtype)
    dy = make.strided_copy(make(len(expert), n))
    dx = grouped.grouped_backward(dy, weights, ends)
    assert_close(dx, torch.einsum("rn,rnk->rk", dy.double(), weights.double()[expert]), dtype=make.dtype)
    turned = make.strided_copy(weights.transpose(1, 2)).transpose(1, 2)
    assert_close(grouped.grouped_forward(rows, turned, ends), y.double(), dtype=make.dtype)
    assert_close(grouped.grouped_backward(dy, turned, ends), dx.double(), dtype=make.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_nothing_waits_for_the_device(dtype: torch.dtype, forward: bool) -> None:
    """It is recorded as a graph, and the replay follows other ends."""
    rows = torch.randn(64, 128, device="cuda").to(dtype)
    weights = torch.randn(4, 128, 128, device="cuda").to(dtype)
    ends = ends_of((16, 16, 16, 16), "cuda")[0]
    product = grouped.grouped_forward if forward else grouped.grouped_backward
    product(rows, weights, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(rows, weights, ends)
    for counts in ((64, 0, 0, 0), (0, 1, 0, 63)):
        new_ends, expert = ends_of(counts, "cuda")
        ends.copy_(new_ends)
        graph.replay()
        matrices = weights.double()[expert] if forward else weights.double()[expert].transpose(1, 2)
        assert_close(y, torch.einsum("rk,rnk->rn", rows.double(), matrices), dtype=dtype)
