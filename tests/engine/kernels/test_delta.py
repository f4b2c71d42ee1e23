"""The gated delta rule and its convolution against their definitions, token by token, through autograd in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from slimtune.engine.kernels import delta, short_conv
from slimtune.engine.kernels import reference_delta as reference
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close, relative_error

HEADS = delta.DeltaHeads(keys=2, values=4, key_dim=24, value_dim=48)
PACKS = [(1,), (57, 3, 1, 9)]  # the last one goes from chunk to chunk


class Rule(NamedTuple):
    """Arguments of the rule, and the gradient of its result."""

    mixed: Tensor
    g: Tensor
    beta: Tensor
    starts: Tensor
    boundaries: Tensor
    do: Tensor

    def computed(self, heads: delta.DeltaHeads) -> tuple[Tensor, ...]:
        """o, dmixed, dg, dbeta."""
        where = self.mixed, self.g, self.beta, self.starts, self.boundaries, heads
        o, saved = delta.delta_forward(*where)
        wide = torch.promote_types(self.mixed.dtype, torch.float32)
        assert sum(each.nbytes for each in saved) == saved.nbytes(len(o), heads, wide.itemsize)
        return o, *delta.delta_backward(self.do, *where, saved)

    def defined(self, heads: delta.DeltaHeads) -> tuple[Tensor, ...]:
        """The same by :func:`reference.recurrent` and autograd, in float64 on the CPU."""
        inputs = [x.double().cpu().requires_grad_() for x in self[:3]]
        o = reference.recurrent(*inputs, self.starts.cpu(), heads)
        o.backward(self.do.double().cpu())
        return o.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)


def boundaries(lengths: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """starts, and boundaries that go on repeating the end as a recorded graph's do."""
    ends = torch.tensor([0, *lengths, 0, 0]).cumsum(0).int()
    starts = ends[: len(lengths)].repeat_interleave(torch.tensor(lengths))
    return starts.to(device), ends.to(device)


def rule(make: Maker, lengths: tuple[int, ...], heads: delta.DeltaHeads = HEADS) -> Rule:
    """Decays from none to all at once, and keys that resemble each other."""
    tokens = sum(lengths)
    wide = torch.promote_types(make.dtype, torch.float32)
    mixed = make(tokens, sum(heads.columns)) + 0.7
    g = -(make(tokens, heads.values, dtype=wide).abs() ** 5)
    g[::7] = 0.0
    beta = torch.sigmoid(3 * make(tokens, heads.values, dtype=wide))
    return Rule(mixed, g, beta, *boundaries(lengths, make.device), make(tokens, heads.columns[2]))


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_equals_the_recurrence(make: Maker, lengths: tuple[int, ...]) -> None:
    given = rule(make, lengths)
    for actual, expected in zip(given.computed(HEADS), given.defined(HEADS), strict=True):
        if expected.any():
            # A chunk's inverse is of keys that resemble each other, and what follows are differences of products; of
            # 16 bits, each product is rounded to 11 bits of mantissa for tensor cores.
            factor = {torch.float32: 20.0, torch.float16: 10.0, torch.bfloat16: 4.0}[make.dtype]
            assert_close(actual, expected, dtype=make.dtype, factor=factor)
        else:
            assert not actual.any()


@pytest.mark.parametrize(
    ("lengths", "heads"),
    [((1000, 1, 200, 64, 63, 2), delta.DeltaHeads(1, 2, 8, 12)), ((40, 20), delta.DeltaHeads(2, 4, 1, 1))],
    ids=str,
)
def test_in_float64_with_documents_of_1_to_1000_tokens(lengths: tuple[int, ...], heads: delta.DeltaHeads) -> None:
    given = rule(Maker("cpu", torch.float64), lengths, heads)
    for actual, expected in zip(given.computed(heads), given.defined(heads), strict=True):
        assert actual.is_contiguous()
        assert relative_error(actual, expected) < 1e-12


def test_through_several_chunks_and_whatever_lies_beside(device: str) -> None:
    """To the bit: what lies in one chunk with a document multiplies it by zeros."""
    heads, make = delta.DeltaHeads(1, 2, 24, 16), Maker(device, torch.float32)
    given = rule(make, (70, 20, 110), heads)
    whole = given.computed(heads)
    for actual, expected in zip(whole, given.defined(heads), strict=True):
        assert_close(actual, expected, dtype=torch.float32, factor=20.0)
    other = given._replace(mixed=given.mixed.clone(), g=given.g.clone())
    other.mixed[70:90] = make(20, sum(heads.columns), scale=9.0)
    other.g[70:90] = -90.0
    for before, after in zip(whole, other.computed(heads), strict=True):
        assert torch.equal(before[:70], after[:70])
        assert torch.equal(before[90:], after[90:])


@pytest.mark.parametrize(("columns", "with_bias"), [(88, True), (152, False)])
def test_convolution(make: Maker, columns: int, with_bias: bool) -> None:
    lengths = (17, 5, 2, 1, 3, 20)
    starts, _ = boundaries(lengths, make.device)
    x, dy = make.strided_copy(make(sum(lengths), columns)), make.strided_copy(make(sum(lengths), columns))
    weight, bias = make(columns, 4), make(columns) if with_bias else None
    wide, many = x.double().requires_grad_(), None if bias is None else bias.double()
    documents = [
        silu(conv1d(part.T[None], weight.double()[:, None], many, padding=3, groups=columns)[0, :, : len(part)]).T
        for part in wide.split(lengths)
    ]
    expected = torch.cat(documents)
    expected.backward(dy.double())
    assert_close(short_conv.conv_silu_forward(x, weight, bias, starts), expected.detach(), dtype=make.dtype)
    assert_close(short_conv.conv_silu_backward(dy, x, weight, bias, starts), wide.grad, dtype=make.dtype)


def test_a_device_that_computes_it_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at start, with the specification in the kernels' place, and with one whose backward is wrong."""

    def wrong(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dmixed, dg, dbeta = reference.delta_backward(*args)
        return dmixed, dg.roll(1, 0), dbeta

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(delta, "_forward", reference.delta_forward)
    monkeypatch.setattr(delta, "_backward", reference.delta_backward)
    assert delta.is_right.__wrapped__(torch.device("cpu"), torch.bfloat16, 16, 32)
    monkeypatch.setattr(delta, "_backward", wrong)
    with pytest.warns(UserWarning, match="wrong, or has no kernel, on cpu"):
        assert not delta.is_right.__wrapped__(torch.device("cpu"), torch.bfloat16, 16, 32)
