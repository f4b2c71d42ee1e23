"""Part four of the explanation, its first half: the steps that were trained, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slimtune.run.changes import has_changed
from slimtune.run.screen import size_text, time_left
from slimtune.run.statement import (
    Bar,
    Facts,
    Say,
    Section,
    Statement,
    code,
    counted,
    is_finite,
    listed,
    part_name,
    plain,
    share,
    value_text,
)
from slimtune.words import in_chinese

__all__ = ["tell_optimizer", "tell_training"]


def tell_training(facts: Facts, say: Say) -> Section | None:
    """The steps: how many, how fast, in which memory, what proved them, and what the loss became."""
    training = facts.get("training")
    if not training:
        return None
    tokens, supervised = training["tokens"], training["supervised_tokens"]
    engine = plain(training["engine"])
    kind, colon, reason = engine.partition(": ")
    engine_zh = f"{kind}：{in_chinese(reason)}" if colon else in_chinese(kind)
    last_en, last_zh = ("last ", "最后的") if has_changed(facts) else ("", "")
    told = [
        Statement(
            say(
                f"{counted(training['steps'], 'optimizer step')}, {counted(training['epochs'], 'epoch')}, in "
                f"{time_left(training['seconds'])} ({last_en}engine: {engine}): {tokens:,} tokens, {supervised:,} of "
                f"them supervised, {training['tokens_per_second']:,.0f} tokens/s.",
                f"共训练 {training['steps']:,} 步，合 {training['epochs']:.4g} 轮，用时 "
                f"{time_left(training['seconds'])}（{last_zh}引擎：{engine_zh}）；处理 {tokens:,} 个 token，"
                f"其中 {supervised:,} 个带监督，每秒 {training['tokens_per_second']:,.0f} 个。",
            )
        ),
        _loss(training, say),
        Statement(_memory(training, say)),
    ]
    told += _proof(training, say)
    if training.get("floor_share"):
        told.insert(1, Statement(_speed(training, say)))
    elif "floor_share" in training:
        text = say(
            "how near the steps came to what this machine can do: the model doesn't say how much work a token is.",
            "训练速度离本机极限有多远，因为从这个模型的模块数不出每个 token的运算量。",
        )
        told.append(Statement(text, "unmeasured"))
    counts = _ranks(training, facts.get("ranks") or ())
    if max(counts.values()) > 1:
        told.append(Statement(_together(counts, say), "proved"))
    if "repeats" in training and not has_changed(facts) and len(counts) == 1:  # or no one command trains it again
        told.append(Statement(_repeats(training["repeats"], say)))
    if not facts.get("verdict"):  # which says it otherwise
        told.append(_held_out(training, say))
    return Section("training", part_name(4, say), say("The training", "训练"), tuple(told))


def _ranks(training: Facts, changes: Iterable[Facts]) -> dict[int, int]:
    """How many processes trained it, by the first step that they did."""
    changes = [change for change in changes if change["step"] < training["steps"]]  # the others trained none
    began = changes[0]["before"] if changes else training.get("ranks", 1)
    return {1: began} | {change["step"] + 1: change["after"] for change in changes}


def _together(counts: Mapping[int, int], say: Say) -> str:
    shared = (
        "each a share of every step's micro-batches; at each step their adapters were compared and were the same.",
        "每一步的微批次由它们分担；每一步都核对过，各进程的适配器一致。",
    )
    if len(counts) == 1:
        count = counts[1]
        return say(f"{count} processes trained it together, {shared[0]}", f"由 {count} 个进程一起训练，{shared[1]}")
    each = [
        say(f"{counted(count, 'process', 'es')} from step {step:,} on", f"从第 {step:,} 步起由 {count} 个进程")
        for step, count in counts.items()
    ]
    return say(
        f"It was trained by {listed(each, say)}, {shared[0]} Their sums round differently.",
        f"训练{listed(each, say)}进行，{shared[1]}进程数不同，求和的舍入也不同。",
    )


def _loss(training: Facts, say: Say) -> Statement:
    first, last = training["first_loss"], training["last_loss"]
    sound = is_finite(first) and is_finite(last)
    return Statement(
        say(
            f"The loss began at {value_text(first, say)}; over the last tenth of the logged steps its mean is "
            f"{value_text(last, say)}.",
            f"损失起初为 {value_text(first, say)}；有记录的最后十分之一步里，平均为 {value_text(last, say)}。",
        ),
        "told" if sound else "broken",
    )


def _speed(training: Facts, say: Say) -> str:
    rate, reached = training["model_flops_per_second"], f"{training['floor_share']:.0%}"
    number = f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"
    return say(
        f"That is {number} of the model's own work, {reached} of the rate at which this machine multiplies large "
        "matrices (measured before the first step).",
        f"折合模型自身运算 {number}，达到本机大矩阵乘法速度（训练前实测）的 {reached}。",
    )


def _memory(training: Facts, say: Say) -> str:
    size, kind = size_text(training["peak_memory_bytes"]), training["memory_kind"]
    if kind == "gpu peak allocated":
        away, locked = training.get("ram_layers", 0), size_text(training.get("ram_bytes", 0))
        in_ram = say(
            f" What {away} layers need in their backward waited for it in RAM: {locked} of it were locked.",
            f"{away} 层反向计算要用的数据在等待时放在内存里，为此锁定了 {locked} 内存。",
        )
        layers, held = training.get("streamed_layers", 0), size_text(training.get("streamed_bytes", 0))
        streamed = say(
            f" The weights of {layers} layers were in RAM and came a layer ahead: {held} of it were locked.",
            f"{layers} 层的权重放在内存里，提前一层传到显卡，为此锁定了 {held} 内存。",
        )
        told = say(f"At its peak, {size} of GPU memory were allocated.", f"显存分配的峰值是 {size}。")
        return told + (in_ram if away else "") + (streamed if layers else "")
    if kind == "process resident":
        return say(
            f"At a logged step, the process held at most {size}.", f"按有记录的步计，进程占用内存最多时为 {size}。"
        )
    return say(f"Memory: {size} ({plain(kind)}).", f"内存：{size}（{plain(kind)}）。")


def _proof(training: Facts, say: Say) -> list[Statement]:
    """That the loss was the model's own, and that every adapter took part in it."""
    told = []
    if training.get("own_head"):
        why = training["own_head"]
        text = say(f"The logits came from {plain(why)}.", f"训练用的是模型自己的输出头（{plain(why)}）。")
        told.append(Statement(text))
    if kernels := training.get("attention"):
        right = listed([plain(name) for name, is_right in kernels.items() if is_right], say)
        wrong = listed([plain(name) for name, is_right in kernels.items() if not is_right], say)
        if right:
            text = say(
                f"On this GPU, forward and backward, {right} computed what plain products in 32 bits do.",
                f"在这块 GPU 上，{right} 的前向与反向结果同 32 位普通矩阵乘法的一致。",
            )
            told.append(Statement(text, "proved"))
        if wrong:
            text = say(
                f"On this GPU {wrong} computed something else than plain products do, and was left out.",
                f"在这块 GPU 上，{wrong} 算出的结果与普通矩阵乘法不同，因此没有采用。",
            )
            told.append(Statement(text))
    silent = training.get("without_gradient")
    if silent == []:
        text = say(
            "The loss of the first document was the model's own, and every adapter got a gradient.",
            "首篇文档上的损失与模型自身算出的一致，并且每个适配器都得到了梯度。",
        )
        told.append(Statement(text, "proved"))
    elif silent:
        names = listed([code(name) for name in silent[:4]] + (["…"] if len(silent) > 4 else []), say)
        text = say(
            f"{counted(len(silent), 'adapter')} got no gradient in the first steps and learned nothing: {names}.",
            f"前几步里有 {len(silent):,} 个适配器没有得到梯度，什么也没学到：{names}。",
        )
        told.append(Statement(text))
    return told


def _repeats(repeats: bool, say: Say) -> str:
    if repeats:
        return say(
            "Every kernel was deterministic: the same command with the same data and versions gives the same adapter "
            "bytes on this machine.",
            "所用计算核全是确定性的：在本机上，用同样的命令、数据和版本再跑一次，得到的适配器逐字节相同。",
        )
    return say(
        "Some of the GPU's kernels add in no fixed order, so the same command gives the same adapter but for rounding; "
        "`--deterministic` fixes the order.",
        "部分 GPU 计算核的累加次序不固定，同样的命令再跑一次，结果只在舍入误差上有别；"
        "加 `--deterministic` 可固定次序。",
    )


def _held_out(training: Facts, say: Say) -> Statement:
    if training.get("eval_loss") is None:
        text = say("the loss on held-out data, as none was given.", "留出数据上的损失，因为没有提供留出数据。")
        return Statement(text, "unmeasured")
    value = value_text(training["eval_loss"], say)
    return Statement(say(f"The last loss on held-out data is {value}.", f"留出数据上最后一次的损失是 {value}。"))


def tell_optimizer(facts: Facts, say: Say) -> Section | None:
    """What the optimizer keeps beside the adapter, and that it updates nothing else."""
    optimizer = facts.get("optimizer")
    if not optimizer:
        return None
    sizes: Mapping[str, int] = optimizer["state_bytes"]
    state, plain = sum(sizes.values()), 8 * optimizer["parameters"]
    name, kind = code(optimizer["name"]), code(optimizer["class_name"])
    split = listed((f"{size_text(size)} {code(dtype)}" for dtype, size in sizes.items()), say)
    if state:
        text = say(
            f"{name} ({kind}) keeps {size_text(state)} of state: {split}. Adam in fp32 would keep two values of 4 "
            f"bytes for each of the {optimizer['parameters']:,} parameters, {size_text(plain)}; this is "
            f"{share(state, plain)} of that.",
            f"{name}（{kind}）的状态共 {size_text(state)}：{split}。换作 fp32 的 Adam，要为这 "
            f"{optimizer['parameters']:,} 个参数各存两个 4 字节的数，共 {size_text(plain)}；现在只有它的 "
            f"{share(state, plain)}。",
        )
    else:
        text = say(
            f"the state of {name} ({kind}): none was found where optimizers keep it.",
            f"{name}（{kind}）的状态：在优化器通常存放状态的地方没有找到。",
        )
    told = [Statement(text, "told" if state else "unmeasured")]
    if {"uint8", "float32"} <= set(sizes):
        told.append(
            Statement(
                say(
                    "The 8-bit part is the states' codes; the fp32 part is their scales, and the states of tensors too "
                    "small to be worth quantising.",
                    "8 位部分是状态的编码；fp32 部分是编码的缩放系数，以及小到不值得量化的张量的状态。",
                )
            )
        )
    adapter = facts.get("adapter")
    if adapter:
        same = optimizer["parameters"] == adapter["trainable_parameters"]
        told.append(
            Statement(
                say(
                    f"It updates {optimizer['parameters']:,} parameters, and {adapter['trainable_parameters']:,} are "
                    f"trainable: {'the adapter and nothing else' if same else 'THESE DIFFER'}.",
                    f"它更新 {optimizer['parameters']:,} 个参数，可训练的有 {adapter['trainable_parameters']:,} 个："
                    f"{'只有适配器，别无其他' if same else '两者不一致！'}。",
                ),
                "proved" if same else "broken",
            )
        )
    bars: tuple[Bar, ...] = (
        ()
        if not state
        else (
            Bar("fp32 Adam", size_text(plain), (("float32", float(plain)),)),
            Bar(str(optimizer["name"]), size_text(state), tuple((dtype, float(size)) for dtype, size in sizes.items())),
        )
    )
    return Section("optimizer", part_name(4, say), say("The optimizer's state", "优化器状态"), tuple(told), bars)
