"""Attention inside documents: against one formula in float64, by whatever a model's mask function draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from slimtune.engine.attention import Documents
from slimtune.training import packs
from slimtune.training.packs import (
    NAME,
    CannotPack,
    DocumentAttention,
    PackMask,
    documents_of,
    pack_mask,
    packed_attention,
)
from tests.tolerances import assert_close

LENGTHS = (17, 5, 30, 1, 8, 3)
TOKENS = sum(LENGTHS)


def documents(device: str = "cpu") -> Documents:
    return documents_of(LENGTHS, torch.device(device))


def starts(device: str = "cpu") -> Tensor:
    return torch.cat([torch.full((length,), sum(LENGTHS[:at]), device=device) for at, length in enumerate(LENGTHS)])


def expected(
    query: Tensor, key: Tensor, value: Tensor, seen: Callable[[Tensor, Tensor], Tensor], scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[T, N, D] in float64: one softmax over all of the pack, with everything hidden that isn't ``seen``."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("bntd,bnsd->bnts", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(TOKENS, device=query.device)
    begin = starts().to(query.device)
    allowed = (begin[:, None] == begin) & (at[:, None] >= at) & seen(at[:, None] - begin[:, None], at - begin[:, None])
    weights = scores.masked_fill(~allowed, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    return torch.einsum("bnts,bnsd->btnd", weights / total, value)


def packed(*at: Tensor) -> Any:
    """What Transformers makes where it is told the positions."""
    return and_masks(causal_mask_function, packed_sequence_mask_function(starts(str(at[-1].device))[None]))(*at)


PATTERNS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "causal": (causal_mask_function, lambda q, k: q >= k),
    "window": (sliding_window_causal_mask_function(6), lambda q, k: q - k < 6),
    "wide window": (sliding_window_causal_mask_function(64), lambda q, k: q >= k),
    "chunks": (chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)), lambda q, k: q // 8 == k // 8),
    "packed": (packed, lambda q, k: q >= k),
}


@pytest.mark.parametrize(
    ("device", "way"), [("cpu", None), ("cpu", "triton"), pytest.param("cuda", None, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(
    ("pattern", "heads", "sizes", "softcap", "sinks"),
    [
        ("causal", (4, 4), (16, 16), None, False),
        ("causal", (6, 2), (24, 16), None, False),
        ("window", (4, 2), (16, 16), None, False),
        ("wide window", (4, 2), (16, 16), None, False),
        ("packed", (4, 2), (16, 16), None, False),
        ("causal", (4, 2), (16, 16), 2.0, False),
        ("causal", (4, 2), (16, 16), None, True),
        ("window", (4, 1), (64, 64), None, True),
        ("window", (4, 2), (16, 16), 3.0, True),
    ],
)
def test_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    way: str | None,
    pattern: str,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    softcap: float | None,
    sinks: bool,
) -> None:
    """``way``: as if the engine had this one for the device; on a CPU the kernel's specification is computed."""
    if way is not None:
        monkeypatch.setattr(packs, "choose", lambda *_, **__: way)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    shapes = [(1, heads[0], TOKENS, sizes[0]), (1, heads[1], TOKENS, sizes[0]), (1, heads[1], TOKENS, sizes[1])]
    given = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    given += [torch.randn(heads[0]).to(device, dtype).requires_grad_()] if sinks else []
    exact = [x.detach().double().requires_grad_() for x in given]
    function, seen = PATTERNS[pattern]
    if pattern == "packed":  # a model's own tensors lie where it lies
        own = packed_sequence_mask_function(starts()[None].to(device))
        function = and_masks(causal_mask_function, own)
    mask = PackMask(documents(device), function)
    scale = 0.3
    made, _ = packed_attention(
        nn.Module(), *given[:3], mask, scaling=scale, softcap=softcap, s_aux=given[3] if sinks else None
    )
    want = expected(*exact[:3], seen, scale, softcap, exact[3] if sinks else None)
    do = torch.randn(want.shape).to(device, dtype)
    made.backward(do)
    want.backward(do.double())
    # In 16 bits the probabilities and the result are rounded before they are used, and the gradients once more.
    factor = 1.0 if dtype == torch.float32 else 6.0
    assert_close(made.detach(), want.detach(), dtype=dtype, factor=factor)
    for one, exactly in zip(given, exact, strict=True):
        assert_close(one.grad, exactly.grad, dtype=dtype, factor=factor)


def test_patterns_that_are_no_window_are_computed_as_they_are_drawn() -> None:
    # Chunks count from the pack's beginning where a model hands its mask no positions: the function is what is asked.
    mask = PackMask(documents(), PATTERNS["chunks"][0])
    assert not mask.is_window
    begin, end = mask.bounds[2]
    at = torch.arange(begin, end)
    assert torch.equal(mask.patterns[2][0, 0], (at[:, None] >= at) & (at[:, None] // 8 == at // 8))


@pytest.mark.parametrize(("window", "found"), [(1, 1), (6, 6), (1999, 1999), (2000, None), (5000, None)])
def test_windows_are_read_off_long_documents(window: int, found: int | None) -> None:
    mask = PackMask(documents_of((3, 2000, 700), torch.device("cpu")), sliding_window_causal_mask_function(window))
    assert mask.is_window
    assert mask.window == found


def test_refuses_what_it_does_not_compute() -> None:
    query = torch.randn(1, 2, TOKENS, 8)
    mask = PackMask(documents(), causal_mask_function)
    for given in ({"indices": torch.zeros(3)}, {"position_bias": torch.zeros(3)}, {"is_causal": False}):
        with pytest.raises(CannotPack):
            packed_attention(nn.Module(), query, query, query, mask, **given)
    with pytest.raises(CannotPack, match="of its own"):
        packed_attention(nn.Module(), query, query, query, torch.ones(1, 1, TOKENS, TOKENS))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=1))
    with DocumentAttention(model).within(documents()):
        with pytest.raises(CannotPack):
            pack_mask(2, TOKENS, TOKENS)
        with pytest.raises(CannotPack):
            pack_mask(1, TOKENS, TOKENS, attention_mask=torch.zeros(1, TOKENS).bool())
        assert pack_mask(1, TOKENS, TOKENS).window is None


def test_one_instance_and_one_step_have_it() -> None:
    def make() -> LlamaForCausalLM:
        shape = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**shape))

    mine, other = make(), make()
    ids = torch.arange(TOKENS)[None] % 32
    before = mine(ids).logits
    with DocumentAttention(mine).within(documents()):
        assert mine.config._attn_implementation == NAME
        assert other.config._attn_implementation != NAME
        assert AttentionInterface()[NAME] is packed_attention
        inside = mine(ids).logits
    assert not torch.allclose(before, inside)
    assert torch.equal(mine(ids).logits, before)
