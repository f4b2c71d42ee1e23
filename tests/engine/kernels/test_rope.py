"""The rotation and the head norms against their float64 references and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rope
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_rope

from slimtune.engine.kernels import reference, rope
from slimtune.engine.kernels.formats import Pairs
from tests.engine.kernels.maker import Maker
from tests.tolerances import assert_close

# tokens, heads, key-value heads, head dimension: grouped queries, numbers of heads that are no power of two, one head.
SHAPES = [(13, 9, 3, 64), (5, 16, 16, 128), (11, 3, 1, 80), (2, 14, 2, 64)]


def tables(make: Maker, dim: int, positions: int = 300) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions).double()[:, None] * 1e4 ** (-torch.arange(0, dim, 2).double() / dim)
    return angles.cos().float().to(make.device), angles.sin().float().to(make.device)


def positions(make: Maker, tokens: int) -> Tensor:
    """Two documents, the second starting over."""
    first = tokens // 3
    return torch.cat((torch.arange(first) + 250, torch.arange(tokens - first))).to(make.device)


def fused(make: Maker, tokens: int, heads: int, kv: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of one buffer whose rows have poison behind them."""
    buffer = make.strided_copy(make(tokens, (heads + 2 * kv) * dim))
    q, k, v = buffer.split((heads * dim, kv * dim, kv * dim), dim=1)
    return q.unflatten(1, (heads, dim)), k.unflatten(1, (kv, dim)), v.unflatten(1, (kv, dim))


def transformers_rope(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """As in Transformers: x cos + rotate_half(x) sin, the tables doubled."""
    c = torch.cat((cos, cos), -1)[position_ids][:, None].double()
    s = torch.cat((sin, sin), -1)[position_ids][:, None].double()
    a, b = x.chunk(2, -1)
    return x * c + torch.cat((-b, a), -1) * s


@pytest.mark.parametrize("shape", SHAPES)
def test_rotates_in_place(make: Maker, shape: tuple[int, int, int, int]) -> None:
    q, k, v = fused(make, *shape)
    (cos, sin), ids = tables(make, shape[3]), positions(make, shape[0])
    before = q.double(), k.double(), v.clone()
    rope.rope_(q, k, cos, sin, ids)
    assert_close(q, transformers_rope(before[0], cos, sin, ids), dtype=make.dtype)
    assert_close(k, transformers_rope(before[1], cos, sin, ids), dtype=make.dtype)
    assert torch.equal(v, before[2])

    rope.rope_(q, k, cos, sin, ids, inverse=True)
    assert_close(q, before[0], dtype=make.dtype, factor=2.5)  # rounded twice
    assert_close(k, before[1], dtype=make.dtype, factor=2.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_gradient(make: Maker, shape: tuple[int, int, int, int]) -> None:
    tokens, heads, kv, dim = shape
    dq, dk, dv = make(tokens, heads, dim), make(tokens, kv, dim), make(tokens, kv, dim)
    (cos, sin), ids = tables(make, dim), positions(make, tokens)
    leaves = [x.double().requires_grad_() for x in (dq, dk)]  # the rotation is linear: any point will do
    for leaf, d in zip(leaves, (dq, dk), strict=True):
        transformers_rope(leaf, cos, sin, ids).backward(d.double())
    want = torch.cat((leaves[0].grad, leaves[1].grad, dv.double()), dim=1)
    out = make.strided(tokens, (heads + 2 * kv) * dim).unflatten(1, (heads + 2 * kv, dim))
    merged = rope.merge_qkv_grad(dq, dk, dv, cos, sin, ids, out=out)
    assert merged.data_ptr() == out.data_ptr()
    assert_close(merged, want, dtype=make.dtype)
    assert torch.equal(merged[:, heads + kv :], dv)


@pytest.mark.parametrize("shape", SHAPES)
def test_head_norms_forward_and_gradient(make: Maker, shape: tuple[int, int, int, int]) -> None:
    tokens, heads, kv, dim = shape
    q, k, _ = fused(make, *shape)
    q_weight, k_weight = make(dim), make(dim)
    (cos, sin), ids = tables(make, dim), positions(make, tokens)
    q_out, k_out, rstd = rope.qk_norm_rope(q, k, q_weight, k_weight, 1e-6, cos, sin, ids)
    dq, dk, dv = make(tokens, heads, dim), make(tokens, kv, dim), make(tokens, kv, dim)
    merged = rope.qk_norm_rope_backward(dq, dk, dv, q, k, q_weight, k_weight, rstd, cos, sin, ids)

    wants = []
    for x, weight, d, got in ((q, q_weight, dq, q_out), (k, k_weight, dk, k_out)):
        leaf = x.double().requires_grad_()
        normed = torch.nn.functional.rms_norm(leaf, (dim,), weight.double(), 1e-6)
        rotated = transformers_rope(normed, cos, sin, ids)
        rotated.backward(d.double())
        assert_close(got, rotated.detach(), dtype=make.dtype)
        wants.append(leaf.grad)
    assert_close(merged, torch.cat((*wants, dv.double()), dim=1), dtype=make.dtype)
    want_rstd = reference.qk_norm_rope(
        q.double(), k.double(), q_weight.double(), k_weight.double(), 1e-6, cos.double(), sin.double(), ids
    )[2]
    assert_close(rstd, want_rstd, dtype=torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [None, 32])
def test_other_pairs_as_transformers_has_them(make: Maker, turned: int | None, interleaved: bool) -> None:
    """Phi's partial rotation of halves, GLM's of neighbours."""
    tokens, heads, kv, dim = 11, 6, 2, 64
    q, k, _ = fused(make, tokens, heads, kv, dim)
    (cos, sin), ids = tables(make, turned or dim), positions(make, tokens)
    leaves = [x.double().requires_grad_() for x in (q, k)]
    theirs = glm_rope if interleaved else phi3_rope
    wide = [torch.cat((table, table), -1)[ids][None].double() for table in (cos, sin)]
    wants = theirs(*(leaf.transpose(0, 1)[None] for leaf in leaves), *wide)
    wants = [want[0].transpose(0, 1) for want in wants]

    passing = dim // 2 - cos.shape[1]
    cos = torch.nn.functional.pad(cos, (0, passing), value=1.0)
    sin = torch.nn.functional.pad(sin, (0, passing))
    pairs = Pairs(turned, interleaved)
    rope.rope_(q, k, cos, sin, ids, pairs)
    dq, dk, dv = make(tokens, heads, dim), make(tokens, kv, dim), make(tokens, kv, dim)
    merged = rope.merge_qkv_grad(dq, dk, dv, cos, sin, ids, pairs)
    for got, want, d, leaf in zip((q, k), wants, (dq, dk), leaves, strict=True):
        assert_close(got, want.detach(), dtype=make.dtype)
        want.backward(d.double())
        assert leaf.grad is not None
    assert_close(merged, torch.cat((leaves[0].grad, leaves[1].grad, dv.double()), dim=1), dtype=make.dtype)


def test_head_norms_with_other_pairs(make: Maker) -> None:
    tokens, heads, kv, dim, pairs = 7, 4, 2, 64, Pairs(48)
    q, k, _ = fused(make, tokens, heads, kv, dim)
    weights = make(dim), make(dim)
    (cos, sin), ids = tables(make, dim), positions(make, tokens)
    q_out, k_out, rstd = rope.qk_norm_rope(q, k, *weights, 1e-6, cos, sin, ids, pairs)
    dq, dk, dv = make(tokens, heads, dim), make(tokens, kv, dim), make(tokens, kv, dim)
    merged = rope.qk_norm_rope_backward(dq, dk, dv, q, k, *weights, rstd, cos, sin, ids, pairs)
    tables64 = cos.double(), sin.double()
    wants = []
    for x, weight, d, got in ((q, weights[0], dq, q_out), (k, weights[1], dk, k_out)):
        leaf = x.double().requires_grad_()
        normed = torch.nn.functional.rms_norm(leaf, (dim,), weight.double(), 1e-6)
        rotated = reference._rotate(normed, *tables64, ids, pairs)
        rotated.backward(d.double())
        assert_close(got, rotated.detach(), dtype=make.dtype)
        wants.append(leaf.grad)
    assert_close(merged, torch.cat((*wants, dv.double()), dim=1), dtype=make.dtype)
