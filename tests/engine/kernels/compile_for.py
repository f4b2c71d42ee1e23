"""Compile kernels for a GPU that isn't here: python compile_for.py CAPABILITY DTYPE SHARED [attention HEAD_DIM SOFTCAP]

SHARED is what one program may take there, in bytes. Without the last three all kernels but attention's are compiled.
Prints one JSON line a kernel: its name, the shared memory that one program takes, in bytes, and whether it reads
numbers of e4m3 back.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from slimtune.engine.kernels import (
    _triton,
    adamw8bit,
    attention,
    cross_entropy,
    cross_entropy_fp8,
    delta,
    fp8,
    grouped,
    grouped_lora,
    lora,
    mlp,
    mlp_fp8,
    mxfp4,
    nf4,
    norm,
    rope,
    router,
    routing,
    short_conv,
)
from slimtune.engine.kernels.formats import Pairs

KERNEL_MODULES = (
    adamw8bit, attention, cross_entropy, cross_entropy_fp8, delta, fp8, grouped, grouped_lora, lora, mlp, mlp_fp8,
    mxfp4, nf4, norm, rope, router, routing, short_conv,
)  # fmt: skip
CAPABILITY, DTYPE, SHARED = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])


class NoDevice:
    """The part of a Triton driver that compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


def compile_instead_of_running() -> None:
    run = jit.JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"
        reads = "f16x2.e4m3x2" in kernel.asm["ptx"]
        print(json.dumps({"kernel": name, "shared": kernel.metadata.shared, "reads_e4m3": reads}))
        return kernel

    jit.JITFunction.run = warm_up
    driver.set_active(NoDevice())
    attention.shared_memory = lambda device: SHARED
    for module in KERNEL_MODULES:
        module.runs_on_triton = lambda x: True


def zeros(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def launch_everything() -> None:
    hidden, inner, vocabulary = 2048, 5504, 151936
    # A small batch, a large one, the most shared memory with and without dropout.
    shapes = ((1024, 8, 3, 0.05), (16384, 8, 3, 0.05), (16384, 64, 3, 0.05), (8192, 64, 2, 0.0))
    for tokens, rank, groups, dropout in shapes:
        x, wide = zeros(tokens, hidden), zeros(tokens, hidden + 32)
        a = zeros(rank * groups, hidden, dtype=torch.float32)
        options = {"groups": groups, "dropout": dropout, "seed": zeros(dtype=torch.int64)}
        u = lora.lora_down(x, a, **options, copy=wide[:, :hidden])
        lora.lora_down_backward_(u, x, a, da=a, dx=x, **options)
        lora.lora_up_backward_(x, u[:, :rank], 1.0, db=zeros(hidden, rank, dtype=torch.float32))
    weight, few = zeros(hidden), zeros(64, hidden)
    rstd = norm.norm_forward(few, weight, 1e-5, residual=few)[2]
    norm.norm_backward(few, few, weight, rstd, dresidual=few)
    rstd = norm.norm_forward(few, weight, 1e-5, residual=few, centred=True)[2]
    norm.norm_backward(few, few, weight, rstd, dresidual=few, centred=True)
    gates = zeros(64, 2 * inner).chunk(2, dim=1)
    mlp.gated_backward_(mlp.gated_forward(*gates), *gates, h=zeros(64, inner))
    q, k, v, head = zeros(64, 16, 128), zeros(64, 4, 128), zeros(64, 4, 128), zeros(128)
    table, ids = zeros(64, 64, dtype=torch.float32), torch.arange(64)
    rope.rope_(q, k, table, table, ids)
    rope.merge_qkv_grad(q, k, v, table, table, ids)
    for pairs in (Pairs(64), Pairs(64, interleaved=True)):
        rope.rope_(q, k, table, table, ids, pairs)
        rope.merge_qkv_grad(q, k, v, table, table, ids, pairs)
    rstd = rope.qk_norm_rope(q, k, head, head, 1e-6, table, table, ids)[2]
    rope.qk_norm_rope_backward(q, k, v, q, k, head, head, rstd, table, table, ids)
    cross_entropy.loss_and_grad_(zeros(4, vocabulary), torch.zeros(4, dtype=torch.int64), zeros(dtype=torch.float32))
    cross_entropy.loss_and_grad_(
        zeros(4, vocabulary), torch.zeros(4, dtype=torch.int64), zeros(dtype=torch.float32), softcap=30.0
    )
    f32 = torch.float32
    nested = nf4.NestedScales(zeros(4, dtype=f32), zeros(256, dtype=f32), zeros(dtype=f32))
    packed, scales = zeros(32 * hidden // 2, dtype=torch.uint8), zeros(32 * hidden // 64, dtype=torch.uint8)
    nf4.dequantize(packed, scales, shape=(32, hidden), dtype=DTYPE, nested=nested)
    state, flat = adamw8bit.AdamWState.zeros([8192, 100], "cpu"), zeros(8192 + 256, dtype=f32)
    step, one = torch.ones((), dtype=torch.int64), zeros(dtype=f32)
    skip = torch.zeros((), dtype=torch.bool)
    adamw8bit.adamw_step_(flat, flat, state, lr=one, step=step, grad_scale=one, skip=skip)


def launch_fp8() -> None:
    f32 = torch.float32
    for columns in (2048, 18944):
        shape, blocks = (32, columns), 32 * columns // 64
        packed, scales = zeros(32 * columns // 2, dtype=torch.uint8), zeros(32, dtype=f32)
        nested = nf4.NestedScales(zeros(blocks // 256, dtype=f32), zeros(256, dtype=f32), zeros(dtype=f32))
        again = zeros(64, dtype=torch.int32)
        out, wider = (zeros(32, columns + more, dtype=fp8.E4M3) for more in (0, 2 * again.numel()))
        for codes, over in ((zeros(blocks, dtype=torch.uint8), nested), (zeros(blocks, dtype=f32), None)):
            fp8.from_nf4(packed, codes, scales, shape=shape, nested=over, out=out)
            fp8.from_nf4(packed, codes, scales, shape=shape, nested=over, turned=out.t().contiguous())
            fp8.from_nf4(packed, codes, scales, shape=shape, nested=over, out=wider, again=again)
        fp8.quantize(zeros(*shape), factors=zeros(columns, dtype=f32))
        fp8.quantize(zeros(*shape), again=again)
        gates, factors = zeros(64, 2 * columns).chunk(2, dim=1), zeros(2 * columns, dtype=f32)
        h = zeros(64, columns)
        mlp_fp8.gated_forward(*gates, out=h)
        mlp_fp8.gated_forward(*gates, again=again)
        mlp_fp8.gated_backward(h, *gates, factors, in_place=True)
    for softcap in (None, 30.0):
        targets, logits = torch.zeros(4, dtype=torch.int64), zeros(4, 151936)
        cross_entropy_fp8.loss_and_grad_(logits, targets, 151936, again=2048, softcap=softcap)
    own, scales = zeros(4, 1, dtype=f32), zeros(4096, dtype=f32)
    cross_entropy_fp8.subtract_targets_(zeros(4, 4096), zeros(64, 4096), targets, own, scales, 32)


def launch_fp8_experts() -> None:
    f32, (count, inner, hidden) = torch.float32, (128, 768, 2048)
    again = zeros(count, 64, dtype=torch.int32)
    routes = routing.sort_by_expert(zeros(256, 8, dtype=torch.int64), count)
    x, scales = zeros(256, hidden), zeros(count, 2 * inner, dtype=f32)
    values, own = fp8.quantize(x, routes=routes, again=again)
    fp8.quantize(x, routes=routes, factors=zeros(count, hidden, dtype=f32))
    wide = zeros(count, 2 * inner, hidden + 2 * again.shape[1], dtype=fp8.E4M3)
    fp8.grouped_product(values, own, wide, scales, routes.ends)
    weights, h = zeros(256, 8, dtype=f32), zeros(2048, inner)
    gates = zeros(2048, 2 * inner).chunk(2, dim=1)
    mlp_fp8.gated_forward(*gates, again=again, routes=routes)
    mlp_fp8.experts_backward(h, *gates, scales, activation="silu", routes=routes, weights=weights, dw=weights)
    blocks = 2 * inner * hidden // 64
    nested = nf4.NestedScales(zeros(count, blocks // 256, dtype=f32), zeros(256, dtype=f32), zeros(count, dtype=f32))
    fp8.stack_from_nf4(
        zeros(count, blocks * 32, dtype=torch.uint8), zeros(count, blocks, dtype=torch.uint8), scales,
        shape=(2 * inner, hidden), nested=nested, out=wide, turned=zeros(count, hidden, 2 * inner, dtype=fp8.E4M3),
        again=again,
    )  # fmt: skip


def launch_experts() -> None:
    tokens, slots, count, hidden = 256, 8, 128, 2048
    routes = routing.sort_by_expert(zeros(tokens, slots, dtype=torch.int64), count)
    x, weights = zeros(tokens, hidden), zeros(tokens, slots, dtype=torch.float32)
    rows = routing.gather_rows(x, routes, weights=weights, out=zeros(tokens * slots, hidden + 8)[:, :hidden])
    routing.combine(rows, routes, weights=weights, addend=x)
    routing.row_dot(rows, rows, routes)
    nested = nf4.NestedScales(zeros(4, 8, dtype=torch.float32), weights, zeros(4, dtype=torch.float32))
    codes, scales = zeros(4, 768 * hidden // 2, dtype=torch.uint8), zeros(4, 768 * hidden // 64, dtype=torch.uint8)
    stack = zeros(4, 768, hidden + 8)[..., :hidden]
    nf4.dequantize_stack(codes, scales, shape=(768, hidden), dtype=DTYPE, nested=nested, out=stack)
    blocks, powers = (zeros(4, 768, hidden // size, dtype=torch.uint8) for size in (2, 32))
    mxfp4.dequantize_stack(blocks, powers, dtype=DTYPE, out=stack)
    logits, weight = zeros(tokens, count), zeros(count, dtype=torch.float32)
    groups = router.Choice(slots, "sigmoid", groups=8, kept_groups=4)
    for choice, bias, scale in ((router.Choice(slots), None, weight), (groups, weight, None)):
        chosen = router.choose(logits, choice, bias=bias, expert_scale=scale)[1]
        router.choose_backward(weights, logits, chosen, choice, expert_scale=scale)
    for size in (hidden, hidden + 8):  # an expert of sixteen tokens, and of a thousand
        stack = zeros(count if size == hidden else 2, 64, size)
        y = grouped.grouped_forward(zeros(tokens * slots, size), stack, routes.ends)
        grouped.grouped_backward(y, stack, routes.ends)
    for rank in (8, 64):
        a, b = (zeros(count, *shape, dtype=torch.float32) for shape in ((rank, hidden), (hidden, rank)))
        u = grouped_lora.expert_down(rows, a, routes)
        grouped_lora.expert_down_backward_(u, rows, a, routes, da=a, dx=rows)
        grouped_lora.expert_up_backward_(rows, u, routes, 1.0, db=b, weights=weights)
    gates, dw = zeros(tokens * slots, 2 * 768).chunk(2, dim=1), zeros(tokens, slots, dtype=torch.float32)
    h = mlp.gated_forward(*gates, activation="gelu_tanh")
    mlp.gated_backward_(h, *gates, activation="gelu_tanh", routes=routes, weights=weights, dw=dw)
    both, clamped = zeros(tokens * slots, 2 * 768), mlp.Clamped(1.702, 7.0)
    gates = both[:, ::2], both[:, 1::2]
    h = mlp.gated_forward(*gates, activation=clamped)
    mlp.gated_backward_(h, *gates, activation=clamped, routes=routes, weights=weights, dw=dw)


def launch_delta() -> None:
    """Qwen3.5's heads; before sm_80 the rule is left to plain products."""
    heads, tokens, f32 = delta.DeltaHeads(2, 4, 128, 128), 128, torch.float32
    x, starts = zeros(tokens, sum(heads.columns)), zeros(tokens, dtype=torch.int32)
    weight, bias = zeros(sum(heads.columns), 4), zeros(sum(heads.columns))
    short_conv.conv_silu_backward(short_conv.conv_silu_forward(x, weight, bias, starts), x, weight, None, starts)
    if CAPABILITY < 80:
        return
    where = torch.tensor([0, tokens], dtype=torch.int32), heads
    g = zeros(tokens, heads.values, dtype=f32)
    o, saved = delta.delta_forward(x, g, g, starts, *where)
    delta.delta_backward(o, x, g, g, starts, *where, saved)


def launch_attention(head_dim: int, softcap: float) -> None:
    """With sinks, and unless it is 0 with a soft cap."""
    heads, kv_heads, tokens = 8, 2, 64
    q, k, v = zeros(tokens, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    ends, sinks = torch.tensor([0, tokens], dtype=torch.int32), zeros(heads)
    options = {"scale": 0.1, "softcap": softcap or None}
    o, logsumexp = attention.attention_forward(q, k, v, ends, sinks=sinks, **options)
    attention.attention_backward(torch.zeros_like(o), q, k, v, o, logsumexp, ends, **options)


if __name__ == "__main__":
    if _triton.triton is None:
        raise SystemExit("no Triton here")
    compile_instead_of_running()
    if sys.argv[4:5] == ["attention"]:
        launch_attention(int(sys.argv[5]), float(sys.argv[6]))
    else:
        launch_everything()
        launch_experts()
        if CAPABILITY >= 89:
            launch_fp8()
            launch_fp8_experts()
        launch_delta()
