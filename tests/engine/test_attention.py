"""Attention inside documents, forward and backward, against float64 with a mask; every path that the machine has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from slimtune.engine import attention as attention_module
from slimtune.engine.attention import Attention, Documents, Way, choose, compared, heads_at_once, is_right

HEADS, DIM = 6, 16
LENGTHS = (9, 9, 1, 130, 4)


def inputs(kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    fused = torch.randn(sum(LENGTHS), HEADS + 2 * kv_heads, DIM, dtype=torch.float64).to(dtype)
    return list(fused.split([HEADS, kv_heads, kv_heads], dim=1))


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ / 4) v over the pack, everything outside the documents masked."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(sum(LENGTHS))
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    share = HEADS // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = torch.einsum("tnd,snd->nts", q, k) * 0.25
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0.0 if sinks is None else sinks.exp()[:, None, None])
    return torch.einsum("nts,snd->tnd", weights / total, v)


def compare(
    way: Way,
    device: str,
    dtype: torch.dtype,
    kv_heads: int,
    window: int | None,
    room: int = 0,
    softcap: float | None = None,
    sunk: bool = False,
) -> list[float]:
    """Relative errors of o, dq, dk and dv, and of these three again by one kv head after the other."""
    q, k, v = (x.to(device) for x in inputs(kv_heads, dtype))
    # As a recorded graph has them: the boundaries go on, and the longest is rounded up, but not past the tokens.
    ends = torch.tensor([0, *LENGTHS, 0, 0]).cumsum(0).int().to(device)
    sinks = torch.linspace(-1, 2, HEADS, dtype=dtype, device=device) if sunk else None
    attention = Attention(Documents(LENGTHS, ends, sum(LENGTHS), room), way, 0.25, window, softcap, sinks)
    o, saved = attention.forward(q, k, v)
    do = torch.randn(o.shape, dtype=torch.float64).to(device, dtype)
    # do and o are the first columns of wider buffers, as the engine has them.
    columns = HEADS * DIM
    do, o = (torch.nn.functional.pad(x.flatten(1), (0, 8))[:, :columns].view(x.shape) for x in (do, o))
    grads = list(attention.backward(do, q, k, v, o, saved))
    places = [x.clone() for x in (q, k, v)]
    with mock.patch.object(attention_module, "_FILLING", 1):
        attention.backward_in_place(do, *places, o, saved)
    grads += places

    wide = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    want = expected(*wide, window, softcap, None if sinks is None else sinks.double().cpu())
    want.backward(do.double().cpu())
    pairs = list(zip((o, *grads), (want.detach(), *(x.grad for x in wide * 2)), strict=True))
    assert all(actual.dtype == dtype for actual, _ in pairs)
    return [float((actual.double().cpu() - reference).norm() / reference.norm()) for actual, reference in pairs]


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_forward_and_backward(dtype: torch.dtype, bound: float, kv_heads: int, window: int | None) -> None:
    assert max(compare("torch", "cpu", dtype, kv_heads, window)) < bound


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("softcap", "sunk"), [(2.0, False), (None, True), (3.0, True)])
@pytest.mark.parametrize(
    ("way", "device", "dtype", "bound"),
    [
        ("torch", "cpu", torch.float64, 1e-12),
        ("torch", "cpu", torch.bfloat16, 2e-2),
        ("triton", "cpu", torch.float64, 1e-12),  # the kernel's specification
        pytest.param("torch", "cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", torch.bfloat16, 1e-2, marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", torch.float16, 3e-3, marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", torch.float32, 1e-5, marks=pytest.mark.gpu),
        pytest.param("varlen", "cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_soft_caps_and_sinks(
    way: Way, device: str, dtype: torch.dtype, bound: float, softcap: float | None, sunk: bool, window: int | None
) -> None:
    if way == "varlen" and softcap is not None:
        with pytest.raises(ValueError, match="no soft cap"):
            compare(way, device, dtype, 2, window, softcap=softcap, sunk=sunk)
    else:
        assert max(compare(way, device, dtype, 2, window, softcap=softcap, sunk=sunk)) < bound


def test_a_way_that_has_no_sinks_says_so() -> None:
    documents = Documents(LENGTHS, torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS))
    with pytest.raises(ValueError, match="no sinks"):
        Attention(documents, "cudnn", 0.25, sinks=torch.zeros(HEADS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(
    ("way", "dtype", "bound"),
    [
        ("torch", torch.float64, 1e-12),
        ("torch", torch.float32, 1e-5),
        ("efficient", torch.float32, 1e-5),
        ("efficient", torch.float16, 3e-3),
        ("varlen", torch.float16, 3e-3),
        ("varlen", torch.bfloat16, 2e-2),
        ("triton", torch.bfloat16, 1e-2),
        ("triton", torch.float16, 3e-3),
        ("triton", torch.float32, 1e-5),
    ],
    ids=str,
)
def test_forward_and_backward_on_a_gpu(
    way: Way, dtype: torch.dtype, bound: float, kv_heads: int, window: int | None
) -> None:
    for room in (0, 10_000) if way == "efficient" else (0,):  # a few documents at a time, and all of them
        assert max(compare(way, "cuda", dtype, kv_heads, window, room)) < bound


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "count"),
    [(65536, 32, 8, 1), (16384, 32, 8, 2), (8192, 32, 8, 4), (2048, 32, 8, 8), (64, 9, 3, 3), (10**6, 28, 4, 1)],
)
def test_a_group_of_heads_fills_a_device(tokens: int, heads: int, kv_heads: int, count: int) -> None:
    assert heads_at_once(tokens, heads, kv_heads) == count


H100, T4 = (9, 0), (7, 5)


def test_cudnn_reads_o_and_its_gradient_as_its_plan_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps a plan by q, k and v alone; here as there, it reads the others by the strides of its first call."""
    plans: dict[Any, Any] = {}

    def kernel(*tensors: Any, **_: Any) -> tuple[torch.Tensor, ...]:
        do, q, k, v, o, *_ = tensors
        read = plans.setdefault(tuple((x.shape, x.stride()) for x in (q, k, v)), (do.stride(), o.stride()))
        return *(torch.as_strided(x, x.shape, strides) for x, strides in zip((do, o), read, strict=True)), q

    monkeypatch.setattr(attention_module, "_LAYOUTS", {})
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", kernel)
    documents = Documents((4, 4), torch.tensor([0, 4, 8]).int(), 4)
    attention, q, buffers = Attention(documents, "cudnn", 0.25), torch.randn(8, 2, 3), torch.randn(2, 8, 14)
    # Beside an adapter's columns, or alone.
    (wide_do, do), (wide_o, o) = ((x.view(8, 2, 3), x.contiguous().view(8, 2, 3)) for x in buffers[:, :, :6])
    for given in ((wide_do, wide_o), (do, wide_o), (do, o), (wide_do, o)):
        first, second, _ = attention.backward(given[0], q, q, q, given[1], (None, None, None))
        assert torch.equal(first, do)
        assert torch.equal(second, o)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "lengths", "way"),
    [
        (H100, torch.bfloat16, 128, (2048, 2048), "cudnn"),
        (H100, torch.bfloat16, 128, (2047, 2047), "varlen"),  # a length that comes once
        (H100, torch.bfloat16, 128, (16,), "varlen"),
        ((8, 6), torch.float16, 64, (64, 128), "varlen"),
        (H100, torch.bfloat16, 512, (64, 64), "triton"),
        (H100, torch.float32, 128, (64, 64), "efficient"),
        (T4, torch.float16, 128, (64, 64), "efficient"),
        (T4, torch.bfloat16, 128, (64, 64), "torch"),
        (H100, torch.float64, 128, (64, 64), "torch"),
        (H100, torch.bfloat16, 20, (64, 64), "triton"),
    ],
)
def test_each_device_gets_the_fastest_way_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    lengths: tuple[int, ...],
    way: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_module, "is_right", lambda *_: True)
    assert choose(torch.device("cuda"), dtype, head_dim, lengths) == way
    assert choose(torch.device("cpu"), dtype, head_dim, lengths) == "torch"


def test_deterministic_kernels_leave_cudnns_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by its own name, it sums by atomics all the same: a step on an H200 wasn't the same twice."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    monkeypatch.setattr(attention_module, "is_right", lambda *_: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose(torch.device("cuda"), torch.bfloat16, 128, (2048, 2048)) == "varlen"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "softcap", "sunk", "right", "without"),
    [
        (H100, torch.bfloat16, 128, 50.0, False, "triton", "torch"),
        (H100, torch.bfloat16, 64, None, True, "triton", "varlen"),  # sinks are put into FlashAttention-2's logsumexp
        (H100, torch.bfloat16, 64, 50.0, True, "triton", "torch"),
        (H100, torch.bfloat16, 512, None, False, "triton", "efficient"),
        (H100, torch.float32, 64, 50.0, False, "triton", "torch"),
        (T4, torch.float16, 64, None, True, "triton", "torch"),
    ],
)
def test_what_pytorch_has_no_kernel_for(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None,
    sunk: bool,
    right: str,
    without: str,
) -> None:
    """Triton's kernel, where it is there and right; ``without`` it what is left."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for found, way in ((True, right), (False, without)):
        monkeypatch.setattr(attention_module, "is_right", lambda way, *_, found=found: found or way != "triton")
        assert choose(torch.device("cuda"), dtype, head_dim, (64, 64), softcap=softcap, sinks=sunk) == way


def test_without_triton_its_kernel_is_not_taken() -> None:
    assert not is_right("triton", torch.device("cpu"), torch.bfloat16, 64)


def test_a_kernel_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products stand for the kernel: right, then with a gradient that is a little off, then missing."""

    def verdict(**replaced: Any) -> bool:
        with monkeypatch.context() as patch:
            for name, function in {"forward": Attention._torch_forward, "backward": backward, **replaced}.items():
                patch.setattr(Attention, f"_efficient_{name}", function)
            is_right.cache_clear()
            return is_right("efficient", torch.device("cpu"), torch.float32, 16)

    def backward(self: Attention, *arguments: Any) -> Any:
        return self._torch_backward(*arguments)

    def off(self: Attention, *arguments: Any) -> Any:
        dq, dk, dv = self._torch_backward(*arguments)
        return dq, dk * 1.01, dv

    def missing(self: Attention, *arguments: Any) -> Any:
        raise RuntimeError("no kernel")

    assert verdict()
    with pytest.warns(UserWarning, match="plain products"):
        assert not verdict(backward=off)
    with pytest.warns(UserWarning, match="plain products"):
        assert not verdict(forward=missing)
    is_right.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(attention_module, "is_right", lambda *_: False)
    assert choose(torch.device("cuda"), torch.float16, 64, (8,)) == "torch"


def cudnn_by_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's kernel under cuDNN's name, which reads o and do by the strides of its first call, as in torch 2.11."""
    plan: dict[str, tuple[int, ...]] = {}
    by_cpu, by_cpu_backward = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}") for name in ("", "_backward")
    )

    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float) -> tuple[Any, ...]:
        o, logsumexp = by_cpu(q, *(x.expand(q.shape) for x in (k, v)), 0.0, True, scale=scale)
        return o, logsumexp, *(None,) * 7

    def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *_: Any, scale: float) -> Any:
        o_, do_ = (x.as_strided(x.shape, plan.setdefault(name, x.stride())) for name, x in (("o", o), ("do", do)))
        wide = (x.expand(q.shape) for x in (k, v))
        dq, dk, dv = by_cpu_backward(do_, q, *wide, o_, lse, 0.0, True, scale=scale)
        return dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward)


def test_cudnns_plan_is_tried_with_a_layout_that_it_wasnt_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_LAYOUTS", {})
    device, found = torch.device("cpu"), {}
    for name in ("laid out", "as they are"):
        cudnn_by_its_first_call(monkeypatch)
        with nullcontext() if name == "laid out" else pytest.warns(UserWarning, match="cuDNN's attention is wrong"):
            found[name] = is_right.__wrapped__("cudnn", device, torch.float32, 16)
        monkeypatch.setattr(attention_module, "_laid_out", lambda x, *_: x)
    assert found == {"laid out": True, "as they are": False}


def test_what_was_compared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    device, kinds = torch.device("cuda"), [(128, None, False), (256, None, False)]
    for wrong in ((), ("cudnn",), ("cudnn", "varlen")):
        monkeypatch.setattr(attention_module, "is_right", lambda way, *_, wrong=wrong: way not in wrong)
        assert compared(device, torch.bfloat16, kinds) == {"PyTorch's FlashAttention-2": "varlen" not in wrong}
        found = compared(device, torch.bfloat16, kinds, {(64, 64)})
        assert found == {"cuDNN's attention": "cudnn" not in wrong, "PyTorch's FlashAttention-2": "varlen" not in wrong}
        left = next(way for way in ("cudnn", "varlen", "torch") if way not in wrong)
        assert choose(device, torch.bfloat16, 128, (64, 64)) == left
    assert compared(torch.device("cpu"), torch.bfloat16, kinds) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("way", "dtype", "head_dim", "softcap", "sinks"),
    [
        ("cudnn", torch.bfloat16, 128, False, False),
        ("varlen", torch.bfloat16, 256, False, False),
        ("efficient", torch.float16, 64, False, False),
        ("efficient", torch.float32, 128, False, False),
        ("triton", torch.bfloat16, 64, False, True),
        ("triton", torch.bfloat16, 256, True, False),
        ("triton", torch.bfloat16, 512, False, False),
        ("triton", torch.bfloat16, 80, True, True),
        ("triton", torch.float32, 64, True, True),
    ],
)
def test_kernels_are_right_here(way: Way, dtype: torch.dtype, head_dim: int, softcap: bool, sinks: bool) -> None:
    assert is_right(way, torch.device("cuda"), dtype, head_dim, softcap, sinks)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ((130,), [(130,)]),
        ((64, 64, 64, 64), [(64, 64, 64, 64)]),
        ((16,) * 16, [(16,) * 8, (16,) * 8]),  # each takes a block of 64
        ((1000, *[24] * 42, 16), [(1000, 24, 24), (*[24] * 40, 16)]),
        ((*[8] * 4, 500, 500), [(8,) * 4, (500, 500)]),
    ],
)
def test_runs_of_documents_take_no_more_than_twice_the_tokens(
    lengths: tuple[int, ...], runs: list[tuple[int, ...]]
) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    documents = Documents(lengths, ends, max(lengths))
    made = documents.runs
    assert [tuple(run.boundaries.diff().tolist()) for run in made] == runs
    assert [run.longest for run in made] == [max(run) for run in runs]
    assert [run.tokens.start for run in made] == [0, *[run.tokens.stop for run in made[:-1]]]
    assert [run.tokens.stop - run.tokens.start for run in made] == [sum(run) for run in runs]


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
