"""Attention inside documents, forward and backward, against float64 with a mask; every path that a CPU has."""

from __future__ import annotations

import pytest
import torch

from slimtune.engine.attention import Attention, Documents, choose

HEADS, DIM = 6, 16
LENGTHS = (9, 9, 1, 30, 4)


def inputs(kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    fused = torch.randn(sum(LENGTHS), HEADS + 2 * kv_heads, DIM, dtype=torch.float64).to(dtype)
    return list(fused.split([HEADS, kv_heads, kv_heads], dim=1))


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """softmax(q kᵀ / 4) v over the pack, everything outside the documents masked."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(sum(LENGTHS))
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    share = HEADS // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = torch.einsum("tnd,snd->nts", q, k) * 0.25
    return torch.einsum("nts,snd->tnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_forward_and_backward(dtype: torch.dtype, bound: float, kv_heads: int, window: int | None) -> None:
    q, k, v = inputs(kv_heads, dtype)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    documents = Documents(LENGTHS, ends, max(LENGTHS))
    attention = Attention(documents, choose(q.device, dtype, DIM, LENGTHS), 0.25, window)
    o, saved = attention.forward(q, k, v)
    do = torch.randn(o.shape, dtype=torch.float64).to(dtype)
    grads = attention.backward(do, q, k, v, o, saved)

    wide = [x.double().requires_grad_() for x in (q, k, v)]
    want = expected(*wide, window)
    want.backward(do.double())
    for actual, reference in zip((o, *grads), (want.detach(), *(x.grad for x in wide)), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - reference).norm() < bound * reference.norm()


@pytest.mark.parametrize(
    ("lengths", "way"), [((2048, 2048), "cudnn"), ((2047, 2047), "varlen"), ((16,), "varlen"), ((64, 128), "varlen")]
)
def test_cudnn_takes_rows_of_a_length_that_comes_again(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], way: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(torch.device("cuda"), torch.bfloat16, 128, lengths) == way


def test_no_document_sees_another() -> None:
    q, k, v = inputs(2, torch.float32)
    documents = Documents(LENGTHS, torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS))
    attention = Attention(documents, "torch", 0.25)
    before, _ = attention.forward(q, k, v)
    k, v = k.clone(), v.clone()
    k[:9], v[:9] = 7.0, 7.0
    after, _ = attention.forward(q, k, v)
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])
