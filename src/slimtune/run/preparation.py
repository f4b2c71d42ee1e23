"""Part one of the explanation: the base before and after quantisation, and the account of the data."""

from __future__ import annotations

from slimtune.run.changes import has_changed
from slimtune.run.screen import size_text
from slimtune.run.statement import (
    Bar,
    Facts,
    Say,
    Section,
    Statement,
    Table,
    code,
    counted,
    first_names,
    listed,
    part_name,
    plain,
    sentence,
    share,
)
from slimtune.words import in_chinese

__all__ = ["tell_base", "tell_data"]

FOUR_BITS_AT_MOST = 5.0
"""Bits a parameter, scales included, up to which a part counts as lying in 4 bits (NF4 with plain scales: 4.5)."""


def tell_base(facts: Facts, say: Say) -> Section | None:
    """The base: what it weighs by part, before and after quantisation."""
    base = facts.get("base")
    if not base:
        return None
    count, before, now = base["parameters"], base["bytes_16bit"], base["bytes_now"]
    model, kind = code(base["model"]), code(base["class_name"])
    told = [
        Statement(
            say(
                f"{model} is a {kind} of {count:,} parameters. In 16 bits, 2 bytes each, they would take "
                f"{size_text(before)}; as loaded they take {size_text(now)}, {share(now, before)} of that.",
                f"基座 {model}（{kind}）共有 {count:,} 个参数。若以 16 位存放（每个参数 2 字节），要占 "
                f"{size_text(before)}；实际载入后占 {size_text(now)}，是前者的 {share(now, before)}。",
            )
        )
    ]
    thin = [part for part in base["parts"] if _bits(part) <= FOUR_BITS_AT_MOST]
    rest = [part for part in base["parts"] if part not in thin]
    if base["quantization"] == "none":
        told.append(Statement(say("It was not quantised: the run asked for that.", "按本次运行的要求，基座没有量化。")))
    else:
        told.append(_quantised(base, thin, say))
    if rest and base["quantization"] != "none":
        told.append(_left_alone(base, rest, say))
    rows = [
        (
            _part(part["part"], say),
            f"{part['parameters']:,}",
            size_text(part["bytes_16bit"]),
            size_text(part["bytes_now"]),
            f"{_bits(part):.2f}",
        )
        for part in base["parts"]
    ]
    total = (say("all", "合计"), f"{count:,}", size_text(before), size_text(now), f"{8 * now / max(1, count):.2f}")
    header = (
        say("part", "部分"),
        say("parameters", "参数量"),
        say("in 16 bits", "16 位"),
        say("as loaded", "载入后"),
        say("bits each", "位/参数"),
    )
    bars = tuple(
        Bar(label, size_text(size), tuple((_part(part["part"], say), float(part[key])) for part in base["parts"]))
        for label, size, key in (
            (say("16 bits", "16 位"), before, "bytes_16bit"),
            (say("as loaded", "载入后"), now, "bytes_now"),
        )
    )
    title = say("The base, slimmed to 4 bits", "基座：量化瘦身")
    if base["quantization"] == "none":
        title = say("The base", "基座")
    return Section("base", part_name(1, say), title, tuple(told), bars, (Table(header, (*rows, total), (1, 2, 3, 4)),))


def _quantised(base: Facts, thin: list[Facts], say: Say) -> Statement:
    kind = str(base["quantization"]).upper()
    if not thin:
        return Statement(
            say(
                f"The base was to be quantised to {kind}, but no part of it lies in 4 bits.",
                f"基座本应量化为 {kind}，但没有任何部分以 4 位存放。",
            ),
            "broken",
        )
    before, now = sum(part["bytes_16bit"] for part in thin), sum(part["bytes_now"] for part in thin)
    bits = 8 * now / sum(part["parameters"] for part in thin)
    twice = base["double_quant"]
    return Statement(
        say(
            f"{sentence(listed((_part(part['part'], say) for part in thin), say))} went from {size_text(before)} to "
            f"{size_text(now)}: {kind}, {bits:.2f} bits a parameter, 4 for the weight and {bits - 4:.2f} for its "
            f"block's scale{', itself quantised (double quantisation)' if twice else ''}.",
            f"{listed((_part(part['part'], say) for part in thin), say)}量化为 {kind}，从 {size_text(before)} 瘦到 "
            f"{size_text(now)}，平均每个参数 {bits:.2f} 位：4 位是权重本身，另外 {bits - 4:.2f} 位是分块的缩放系数"
            f"{'，系数自身也再量化了一次（双重量化）' if twice else ''}。",
        ),
        "proved",
    )


def _left_alone(base: Facts, rest: list[Facts], say: Say) -> Statement:
    names = listed((_part(part["part"], say) for part in rest), say)
    before, now = sum(part["bytes_16bit"] for part in rest), sum(part["bytes_now"] for part in rest)
    bits = 8 * now / sum(part["parameters"] for part in rest)
    grown_en = grown_zh = ""
    if now > before:
        grown_en = f", more than in 16 bits, as this run computes in {base['compute_dtype']}"
        grown_zh = f"，比 16 位还大，因为本次运行以 {base['compute_dtype']} 计算"
    return Statement(
        say(
            f"{sentence(names)} stayed as they are ({bits:.0f} bits a parameter): 4-bit quantisation packs linear "
            f"layers and experts only. They take {size_text(now)}{grown_en}.",
            f"{names}保持原样（每个参数 {bits:.0f} 位），4 位量化只作用于线性层和专家；"
            f"这部分占 {size_text(now)}{grown_zh}。",
        )
    )


def tell_data(facts: Facts, say: Say) -> Section | None:
    """The data: rows, documents, tokens, and what became of each row."""
    data = facts.get("data")
    if not data or "rows" not in data:
        return None
    rows, trained, dropped = data["rows"], data["rows_trained"], data["rows_dropped"]
    balanced = rows == trained + dropped
    theirs_en, theirs_zh = ("of theirs ", "这些文档里") if data.get("rehearsed") else ("", "")
    told = [
        Statement(
            say(
                f"{rows:,} rows were read: {trained:,} kept, {dropped:,} dropped. {trained:,} + {dropped:,} "
                f"{'=' if balanced else '≠'} {rows:,}: "
                f"{'every row is accounted for' if balanced else 'THE ACCOUNT DOES NOT BALANCE'}.",
                f"共读入 {rows:,} 行：{trained:,} 行留用，{dropped:,} 行弃用。{trained:,} + {dropped:,} "
                f"{'=' if balanced else '≠'} {rows:,}，{'每一行都有着落' if balanced else '账目对不上！'}。",
            ),
            "proved" if balanced else "broken",
        ),
        Statement(
            say(
                f"They make {data['documents']:,} documents with {data['tokens']:,} tokens in all, of which "
                f"{data['supervised_tokens']:,} ({share(data['supervised_tokens'], data['tokens'])}) are supervised: "
                f"{theirs_en}only these make the loss.",
                f"它们构成 {data['documents']:,} 篇文档、{data['tokens']:,} 个 token，其中 "
                f"{data['supervised_tokens']:,} 个（{share(data['supervised_tokens'], data['tokens'])}）带监督，"
                f"{theirs_zh}只有这些 token 计入损失。",
            )
        ),
    ]
    told += _batches(data, say)
    if unread := data.get("unread"):
        names = first_names(unread)
        text_en = f"Columns and keys of turns that weren't read: {names}."
        told.append(Statement(say(text_en, f"没有读取的列和回合里的键：{names}。")))
    if data.get("rows_repaired"):
        count = data["rows_repaired"]
        text_en = f"{count:,} rows were repaired, each by a rule of the table below."
        told.append(Statement(say(text_en, f"修复了 {count:,} 行，所用规则见下表。")))
    if data.get("eval"):
        told.append(_held_out(data["eval"], say))
    if data.get("rehearsed"):
        epochs = None if has_changed(facts) else (facts.get("training") or {}).get("epochs")
        told.append(_rehearsed(data["rehearsed"], epochs, say))
    if data.get("duplicates"):
        count = data["duplicates"]
        told.append(
            Statement(
                say(
                    f"{count:,} documents are exact copies of another one; they were kept.",
                    f"有 {count:,} 篇文档与别的文档完全相同，予以保留。",
                )
            )
        )
    bars: tuple[Bar, ...] = ()
    if rows:
        pieces = ((say("kept", "留用"), float(trained)), (say("dropped", "弃用"), float(dropped)))
        bars = (Bar(say("rows", "行"), f"{rows:,}", pieces),)
    return Section(
        "data", part_name(1, say), say("The data, row by row", "数据：逐行入账"), tuple(told), bars, _rules(data, say)
    )


def _held_out(data: Facts, say: Say) -> Statement:
    rows, trained, dropped = data["rows"], data["rows_trained"], data["rows_dropped"]
    balanced = rows == trained + dropped
    shout_en, shout_zh = ("", "") if balanced else (" THE ACCOUNT DOES NOT BALANCE.", "账目对不上！")
    both_en, both_zh = "", ""
    if both := data.get("trained_on"):
        both_en = f" {both:,} of its documents were left out: they were trained on too."
        both_zh = f"其中 {both:,} 篇文档也在训练数据里，已排除。"
    return Statement(
        say(
            f"Of the held-out data, {rows:,} rows were read: {trained:,} kept, {dropped:,} dropped.{shout_en}{both_en}",
            f"留出数据共读入 {rows:,} 行：{trained:,} 行留用，{dropped:,} 行弃用。{shout_zh}{both_zh}",
        ),
        "proved" if balanced else "broken",
    )


def _rehearsed(rehearsed: Facts, epochs: float | None, say: Say) -> Statement:
    count, tokens, passes = rehearsed["documents"], rehearsed["tokens"], (epochs or 0.0) / rehearsed.get("rounds", 1)
    often_en, often_zh = (f", {passes:.3g} times each", f"，每个 {passes:.3g} 遍") if passes else ("", "")
    if (weight := rehearsed.get("weight", 1.0)) != 1.0:
        often_en += f", a token counting {weight:g} of a row's"
        often_zh += f"，每个 token 按样本 token 的 {weight:g} 计"
    return Statement(
        say(
            f"Beside them {counted(count, 'general prompt')} with what the base itself had answered "
            f"({tokens:,} tokens, `rehearsed.jsonl`) were trained on{often_en}, so that the adapter keeps what the "
            f"base could.",
            f"此外还混入了 {count:,} 个通用提示，以及基座自己在训练前的回答（{tokens:,} 个 token，`rehearsed.jsonl`）"
            f"{often_zh}，使适配器保住基座原有的本领。",
        )
    )


def _batches(data: Facts, say: Say) -> list[Statement]:
    per_epoch = data.get("micro_batches_per_epoch")
    if per_epoch is None:
        return []
    # Each pass over what is rehearsed stands among several over the rows, which are the run's epochs.
    rounds = data.get("rehearsed", {}).get("rounds", 1)
    epoch_en, epoch_zh = "one epoch is", "每轮（epoch）"
    if rounds > 1:
        epoch_en, epoch_zh = f"{rounds} epochs are", f"{rounds} 轮（epoch）共 "
    if not data.get("packed"):
        fill = data.get("fill")
        full_en, full_zh = ("", "") if fill is None else (f", {fill:.1%} full", f"，利用率 {fill:.1%}")
        why = data.get("unpacked") or "asked for"
        return [
            Statement(
                say(
                    f"Unpacked ({why}), {epoch_en} {counted(per_epoch, 'padded micro-batch', 'es')}{full_en}.",
                    f"不打包（{in_chinese(why)}），{epoch_zh}{per_epoch:,} 个补齐后的微批次{full_zh}。",
                )
            )
        ]
    size, fill = data["pack_tokens"], data["fill"]
    return [
        Statement(
            say(
                f"Packed, {epoch_en} {counted(per_epoch, 'micro-batch', 'es')} of {size:,} tokens, {fill:.1%} full.",
                f"打包之后，{epoch_zh}{per_epoch:,} 个微批次，每个 {size:,} token，利用率 {fill:.1%}。",
            )
        )
    ]


def _rules(data: Facts, say: Say) -> tuple[Table, ...]:
    """Which rule dropped, repaired or noted how many rows, and where the first one stands."""
    actions = {
        "dropped": say("dropped", "弃用"),
        "repaired": say("repaired", "修复"),
        "noted": say("noted", "备注"),
    }
    examples = data.get("examples", {})
    rows = tuple(
        (name, code(rule), f"{count:,}", plain(examples.get(rule, "")))
        for action, name in actions.items()
        for rule, count in data.get(action, {}).items()
    )
    header = (say("action", "处理"), say("rule", "规则"), say("rows", "行数"), say("first case", "首例"))
    return (Table(header, rows, (2,)),) if rows else ()


def _part(name: str, say: Say) -> str:
    chinese = {
        "attention": "注意力", "embedding": "词嵌入", "experts": "专家", "head": "输出头", "norms": "归一化层",
        "other": "其余", "router": "路由", "vision": "视觉",
    }  # fmt: skip
    return say(name, chinese.get(name, name))


def _bits(part: Facts) -> float:
    return float(8 * part["bytes_now"] / max(1, part["parameters"]))
