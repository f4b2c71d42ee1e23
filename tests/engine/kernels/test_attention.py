"""The attention kernel against its float64 reference, and the reference against Transformers' own attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from slimtune.engine.kernels import attention, reference_attention
from slimtune.engine.kernels.attention_tiles import Tile, Tiles, tiles_for
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

LENGTHS = (9, 0, 1, 42, 4)
SMALL = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))
KIB = 1 << 10

# heads, kv heads, head dimension; window, soft cap, sinks; blocks (None: the device's own)
CASES: list[tuple[tuple[int, int, int], dict[str, Any], bool, Tiles | None]] = [
    ((4, 2, 16), {}, False, SMALL),
    ((2, 1, 16), {"window": 5}, False, SMALL),
    ((2, 1, 24), {"window": 20, "softcap": 2.0}, True, SMALL),
    ((2, 1, 80), {"softcap": 1.0}, False, None),
    ((2, 1, 64), {"window": 1}, True, None),
    ((2, 1, 512), {}, True, None),
]


def packed(make: Maker, heads: int, kv_heads: int, dim: int) -> tuple[list[Tensor], Tensor]:
    """q, k and v as columns of one wide buffer, do of another; boundaries that go on."""
    fused = make.strided_copy(make(sum(LENGTHS), (heads + 2 * kv_heads) * dim))
    q, k, v = fused.view(sum(LENGTHS), -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    do = make.strided_copy(make(sum(LENGTHS), heads * dim)).view(-1, heads, dim)
    return [q, k, v, do], torch.tensor([0, *LENGTHS, 0, 0]).cumsum(0).int().to(make.device)


@pytest.mark.parametrize(("shape", "options", "sunk", "tiles"), CASES)
def test_forward_and_backward(
    make: Maker, shape: tuple[int, int, int], options: dict[str, Any], sunk: bool, tiles: Tiles | None
) -> None:
    (q, k, v, do), ends = packed(make, *shape)
    options = {"scale": 0.3 if shape[2] < 64 else 0.1, **options}
    sinks = make(shape[0]) if sunk else None
    o, logsumexp = attention.attention_forward(q, k, v, ends, sinks=sinks, tiles=tiles, **options)
    strided = make.strided_copy(o.flatten(1)).view(o.shape)
    grads = attention.attention_backward(do, q, k, v, strided, logsumexp, ends, tiles=tiles, **options)

    wide = [x.double() for x in (q, k, v)]
    wide_sinks = None if sinks is None else sinks.double()
    want_o, want_sum = reference_attention.attention_forward(*wide, ends, sinks=wide_sinks, **options)
    want = reference_attention.attention_backward(do.double(), *wide, want_o, want_sum, ends, **options)
    assert_close(logsumexp, want_sum, dtype=torch.float32)
    # p and ds are rounded to 16 bits for their products, and o before it is multiplied with do.
    factor = 1.0 if make.dtype == torch.float32 else 2.0
    for actual, expected in zip((o, *grads), (want_o, *want), strict=True):
        assert actual.dtype == make.dtype
        # With a window of one token nothing can be learnt of q and k: their gradients are zero but for rounding.
        if options.get("window") == 1 and sinks is None and expected is not want_o:
            continue
        assert_close(actual, expected, dtype=make.dtype, factor=factor)


def test_repeats_to_the_bit(device: str) -> None:
    (q, k, v, do), ends = packed(Maker(device, torch.float16), 2, 1, 16)

    def computed() -> tuple[Tensor, ...]:
        o, logsumexp = attention.attention_forward(q, k, v, ends, scale=0.25, tiles=SMALL)
        return o, *attention.attention_backward(do, q, k, v, o, logsumexp, ends, scale=0.25, tiles=SMALL)

    assert all(torch.equal(one, other) for one, other in zip(computed(), computed(), strict=True))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_reference_is_what_transformers_computes(family: str, window: int | None) -> None:
    """Forward and autograd of the family's own eager attention, document by document."""
    make = Maker("cpu", torch.float64)
    (q, k, v, do), ends = packed(make, 4, 2, 16)
    sinks, softcap = (make(4), None) if family == "gpt_oss" else (None, 3.0)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    eager = (modeling_gpt_oss if family == "gpt_oss" else modeling_gemma2).eager_attention_forward
    pieces, start = [], 0
    for length in filter(None, LENGTHS):
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= (window or length))
        mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None]
        rows = [x[start : start + length].transpose(0, 1)[None] for x in leaves]
        given = {} if softcap is None else {"softcap": softcap}
        pieces.append(eager(module, *rows, mask, scaling=0.25, dropout=0.0, **given)[0][0])
        start += length
    want = torch.cat(pieces)
    want.backward(do)

    options: dict[str, Any] = {"scale": 0.25, "window": window, "softcap": softcap}
    o, logsumexp = reference_attention.attention_forward(q, k, v, ends, sinks=sinks, **options)
    grads = reference_attention.attention_backward(do, q, k, v, o, logsumexp, ends, **options)
    for actual, expected in zip((o, *grads), (want.detach(), *(x.grad for x in leaves)), strict=True):
        # Transformers takes some softmaxes in float32 whatever comes in.
        assert_close(actual, expected, dtype=torch.float32)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "shared", "there"),
    [
        (512, torch.bfloat16, 227 * KIB, True),
        (512, torch.bfloat16, 163 * KIB, True),
        (512, torch.bfloat16, 99 * KIB, True),
        (512, torch.float16, 64 * KIB, False),
        (256, torch.float16, 64 * KIB, True),
        (512, torch.float32, 163 * KIB, True),
        (512, torch.float32, 99 * KIB, False),
        (16, torch.float32, 64 * KIB, True),
        (128, torch.bfloat16, 0, False),
    ],
)
def test_blocks_for_each_device(head_dim: int, dtype: torch.dtype, shared: int, there: bool) -> None:
    assert (tiles_for(head_dim, dtype, shared) is not None) == there
