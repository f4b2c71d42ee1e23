"""Automatic choices' reasons in Chinese; :mod:`slimtune.plan` and :mod:`slimtune.hardware` give them in English."""

from __future__ import annotations

import re

__all__ = ["reason_in_chinese"]

_REASONS = (
    (r"bf16 is native on (.+) \(compute capability (.+)\)", r"\1（计算能力 \2）原生支持 bf16"),
    (r"(.+) \(compute capability (.+)\) has no native bf16", r"\1（计算能力 \2）不原生支持 bf16"),
    (r"this CPU multiplies bf16 natively \(AVX512-BF16 or AMX\)", "这块 CPU 原生支持 bf16 乘法（AVX512-BF16 或 AMX）"),
    (r"this CPU has no bf16 instructions, so fp32 is fastest", "这块 CPU 没有 bf16 指令，fp32 最快"),
    (r"8-bit states, paged to RAM when the GPU runs short", "状态为 8 位，显存紧张时换页到内存"),
    (
        r"the same 8-bit states; paging moves them between GPU and RAM, and here is no GPU",
        "同样是 8 位状态；换页是在显存与内存之间搬运，而这里没有 GPU",
    ),
    (r"(\d+%) of what (.+) has", r"\2 显存的 \1"),
    (r"(\d+) optimizer steps, so about (\d+) checkpoints", r"共 \1 个优化器步，约存 \2 个检查点"),
    (r"the projections of what mixes tokens: (.+)", r"混合词元的投影层：\1"),
    (
        r"(.+) of (.+) different rows: a twentieth, 8 at least and 200 at most",
        r"\2 行不同的数据中留出 \1 行：二十分之一，至少 8 行，至多 200 行",
    ),
    (r"none of (.+) different rows, as they are fewer than 20", r"不同的数据只有 \1 行，不足 20 行，一行也不留出"),
    (r"eval names the held-out data", "留出数据已由 eval 给定"),
    (
        r"(.+) epochs rounded up to whole micro-batches, of which an epoch has (.+)",
        r"\1 轮，向上凑整到整数个微批次（每轮 \2 个）",
    ),
    (
        r"with the usual (.+) the run would have (.+) optimizer steps, fewer than about (.+)",
        r"若按通常的 \1，本次运行只有 \2 个优化器步，不足约 \3 步",
    ),
    (
        r"the base has (.+) million parameters: one of up to (.+) learns little at (.+)",
        r"基座有 \1 百万参数：不超过 \2 百万的，用 \3 学不到多少",
    ),
    (r"(\d+) optimizer steps, so about (\d+) evaluations", r"共 \1 个优化器步，约评估 \2 次"),
    (r"the engine computes documents by length", "引擎按长度分别计算各个文档"),
    (
        r"the engine's loss on a document in a pack is (.+), and the model's own (.+)",
        r"打包后的文档，引擎算出的损失是 \1，而模型自己的是 \2",
    ),
    (r"the engine can't compute a document in a pack \((.+)\)", r"引擎算不了打包后的文档（\1）"),
    (
        r"the engine's gradient of (.+) on a document in a pack is (.+) of its size from the model's",
        r"打包后的文档，引擎算出的 \1 的梯度与模型自己的相差达其大小的 \2 倍",
    ),
    (r"one at a time", "一次一个文档"),
    (r"asked for", "按要求"),
    (r"a document's logits don't change with what is beside it", "文档的 logits 不随旁边的内容改变"),
    (
        r"a document's logits change with its neighbours in a pack by (.+) of the largest",
        r"打包后，文档的 logits 随相邻文档改变，幅度达最大值的 \1",
    ),
    (r"a document's logits in a pack are not those of the document alone", "打包后，文档的 logits 与单独计算时不同"),
    (
        r"a row's logits change with the other rows by (.+) of the largest",
        r"一行的 logits 随其他行改变，幅度达最大值的 \1",
    ),
    (r"what layers of the type (.+) mix doesn't show in a few tokens", r"\1 类型的层混合了什么，少量词元看不出"),
    (r"a row's logits change with its padding", "一行的 logits 随填充改变"),
    (r"(.+) can't keep packed sequences apart without (.+)", r"没有 \2，\1 无法隔开打包的文档"),
    (r"its attention isn't called through Transformers' interface", "它的注意力不经过 Transformers 的接口"),
)


def reason_in_chinese(reason: str) -> str:
    """The reason in Chinese, or as it is if it has no translation."""
    for pattern, chinese in _REASONS:
        if (found := re.fullmatch(pattern, reason)) is not None:
            return found.expand(chinese)
    parts = reason.split("; ")
    return "；".join(map(reason_in_chinese, parts)) if len(parts) > 1 else reason
