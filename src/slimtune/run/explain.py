"""What a run did, told in four parts from what it measured of itself.

:func:`explain` turns a run's facts (:class:`slimtune.run.facts.Facts`, as ``facts.json`` holds them) into sections of
statements, tables and bars; :mod:`slimtune.run.show` shows them in a terminal, in Markdown and in HTML. Each statement
is written in English and Chinese, side by side, so that no claim stands in one language alone. A statement that can be
checked carries its verdict, computed from the facts. Text between backquotes is code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slimtune.config import TARGET_WORDS
from slimtune.errors import shown
from slimtune.run.changes import frozen_since, has_changed, since, tell_changes
from slimtune.run.preparation import tell_base, tell_data
from slimtune.run.screen import size_text
from slimtune.run.statement import (
    Bar,
    Explanation,
    Facts,
    Lang,
    Say,
    Section,
    Statement,
    Table,
    code,
    listed,
    part_name,
    plain,
    share,
    value_text,
)
from slimtune.run.trained import tell_optimizer, tell_training
from slimtune.run.verdict import tell_verdict
from slimtune.words import in_chinese

__all__ = ["explain"]

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
ADAPTER_FILE = "adapter_model.safetensors"
SETTINGS = ("base", "data", "lora", "optimizer", "choices")
"""Sections of what may change where a run is resumed."""


def explain(facts: Facts, lang: Lang = "en") -> Explanation:
    """Tell what a run did.

    Args:
        facts: :meth:`slimtune.run.facts.Facts.as_dict`; parts that a run didn't come to may be None or missing.
            What changed while it trained is beside them (:attr:`slimtune.run.history.History.on_the_way`).
        lang: ``en`` or ``zh``.
    """

    def say(english: str, chinese: str) -> str:
        return chinese if lang == "zh" else english

    facts = _clean(facts)
    tellers = (
        tell_changes,
        tell_base,
        tell_data,
        _lora,
        _wrapping,
        tell_training,
        tell_verdict,
        tell_optimizer,
        _saving,
        _read_back,
        _choices,
        _limits,
    )
    sections = [section for teller in tellers if (section := teller(facts, say)) is not None]
    if (first := since(facts, say)) is not None:
        sections = [
            replace(section, statements=(first, *section.statements)) if section.key in SETTINGS else section
            for section in sections
        ]
    return Explanation(lang, str(facts.get("run", "")), tuple(sections))


def _clean(value: Any) -> Any:
    """Facts hold names that others gave: as they may stand in a terminal."""
    if isinstance(value, Mapping):
        return {shown(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return shown(value) if isinstance(value, str) else value


def _lora(facts: Facts, say: Say) -> Section | None:
    adapter = facts.get("adapter")
    if not adapter:
        return None
    r, alpha = adapter["r"], adapter["alpha"]
    usual = alpha == 2 * r
    targets = listed((code(name) for name in adapter["targets"]), say)
    told = (
        Statement(
            say(
                f"Rank r = {r}, alpha = {alpha}{', the usual 2r' if usual else ''}, dropout {adapter['dropout']:g}, on "
                f"{targets}.",
                f"秩 r = {r}，alpha = {alpha}{'（惯用的 2r）' if usual else ''}，dropout {adapter['dropout']:g}，"
                f"作用于 {targets}。",
            )
        ),
        Statement(
            say(
                f"Beside each such module stand two thin matrices, A and B, which meet in {r} dimensions. They train; "
                f"the module itself does not.",
                f"每个目标模块旁边挂上一对细长的低秩矩阵 A 和 B，中间只有 {r} 维；训练的是它们，模块自身不动。",
            )
        ),
    )
    return Section("lora", part_name(2, say), say("The adapter's configuration", "LoRA 适配器的配置"), told)


def _wrapping(facts: Facts, say: Say) -> Section | None:
    adapter = facts.get("adapter")
    if not adapter:
        return None
    before, after, wrapper = (code(adapter[key]) for key in ("class_before", "class_after", "wrapped_by"))
    wrapped = adapter["class_before"] != adapter["class_after"] and str(adapter["class_after"]).startswith("Peft")
    if wrapped:
        text = say(
            f"{wrapper} was given a plain {before} and a LoRA configuration, and its constructor made a {after} of it. "
            f"The wrapping is its work: no `get_peft_model` was written by hand.",
            f"交给 {wrapper} 的是普通的 {before} 和一份 LoRA 配置；它一构造完，模型就已封装成 {after}。"
            f"没有手写 `get_peft_model`，“模型封装”这一步由它在幕后完成。",
        )
    else:
        text = say(
            f"{wrapper} was given a {before} and left a {after}: THE MODEL WAS NOT WRAPPED.",
            f"交给 {wrapper} 的是 {before}，出来的是 {after}：模型没有被封装！",
        )
    modules, trainable, total = adapter["modules"], adapter["trainable_parameters"], adapter["total_parameters"]
    counted = listed((f"{code(name)} × {number:,}" for name, number in modules.items()), say)
    endings = {name.rsplit(".", 1)[-1] for name in modules}
    asked = [name for name in adapter["targets"] if name != "all-linear" and name not in TARGET_WORDS]
    missing = [name for name in asked if name.rsplit(".", 1)[-1] not in endings]
    found = say(
        f"Counted on the model afterwards, {sum(modules.values()):,} modules carry an adapter: {counted}.",
        f"事后在模型上逐个清点，共有 {sum(modules.values()):,} 个模块带适配器：{counted}。",
    )
    if missing:
        names = listed((code(name) for name in missing), say)
        found += say(f" Asked for and not found: {names}.", f"要求了却没有找到：{names}。")
    told = (
        Statement(text, "proved" if wrapped else "broken"),
        Statement(found, "broken" if missing or not modules else "proved"),
        Statement(
            say(
                f"{trainable:,} of {total:,} parameters train, {share(trainable, total)}.",
                f"全部 {total:,} 个参数中，只有 {trainable:,} 个参与训练，占 {share(trainable, total)}。",
            )
        ),
        *_covered(adapter, say),
    )
    pieces = ((say("trained", "训练"), float(trainable)), (say("frozen", "冻结"), float(total - trainable)))
    bars = (Bar(say("parameters", "参数"), f"{total:,}", pieces),)
    title = say("The wrapping, by SFTTrainer", "模型封装：SFTTrainer 的幕后工作")
    return Section("wrapping", part_name(3, say), title, told, bars)


def _covered(adapter: Facts, say: Say) -> list[Statement]:
    """What of the base the adapter stands beside; runs before it was counted don't tell."""
    if "adapted_layers" not in adapter:
        return []
    layers, of = adapter["adapted_layers"], adapter["layers"]
    weights = share(adapter["adapted_weights"], adapter["total_parameters"] - adapter["trainable_parameters"])
    told = [
        Statement(
            say(
                f"They stand in {layers:,} of {of:,} layers, beside {weights} of the base's weights.",
                f"它们分布在 {of:,} 层中的 {layers:,} 层，覆盖基座权重的 {weights}。",
            )
        )
    ]
    if experts := adapter["expert_parameters"]:
        told.append(
            Statement(
                say(
                    f"{experts:,} of them are for the experts, adapted as whole stacks and without dropout.",
                    f"其中 {experts:,} 个属于专家：整组专家权重一并适配，不用 dropout。",
                )
            )
        )
    return told


def _saving(facts: Facts, say: Say) -> Section | None:
    base, adapter = facts.get("base"), facts.get("adapter")
    if not base or not adapter:
        return None
    told = [_frozen(facts, base, say)]
    size = adapter.get("file_bytes")
    bars: tuple[Bar, ...] = ()
    if size is None:
        text = say("the saved adapter's size, as none was saved.", "适配器文件的大小，因为没有保存。")
        told.append(Statement(text, "unmeasured"))
    else:
        told.append(_size(base, adapter, size, say))
        bars = (
            Bar(
                say("base, 16 bits", "基座，16 位"), size_text(base["bytes_16bit"]), (("", float(base["bytes_16bit"])),)
            ),
            Bar(
                say("base, as loaded", "基座，载入后"), size_text(base["bytes_now"]), (("", float(base["bytes_now"])),)
            ),
            Bar(say("adapter", "适配器"), size_text(size), (("", float(size)),)),
        )
    files = adapter.get("folder_files") or []
    if files:
        others = [name for name in files if name.endswith(WEIGHT_FILES) and name != ADAPTER_FILE]
        names = listed((code(name) for name in files), say)
        alone = ADAPTER_FILE in files and not others
        told.append(
            Statement(
                say(
                    f"`adapter/` holds {names}. "
                    + ("Its only weights are the adapter's: the base was not saved." if alone else _odd(others, say)),
                    f"`adapter/` 中有 {names}。"
                    + ("其中的权重只有适配器，没有保存基座。" if alone else _odd(others, say)),
                ),
                "proved" if alone else "broken",
            )
        )
    title = say("The base left frozen, the adapter saved", "基座冻结，只存适配器")
    return Section("saving", part_name(4, say), title, tuple(told), bars)


def _odd(others: list[str], say: Say) -> str:
    if not others:
        return say(f"THE ADAPTER'S FILE IS MISSING: `{ADAPTER_FILE}`.", f"缺少适配器文件 `{ADAPTER_FILE}`！")
    names = listed((code(name) for name in others), say)
    return say(f"THERE ARE OTHER WEIGHTS AMONG THEM: {names}.", f"里面混进了别的权重：{names}！")


def _frozen(facts: Facts, base: Facts, say: Say) -> Statement:
    before, after = base["fingerprint_before"], base.get("fingerprint_after")
    what_en = "SHA-256 over each base tensor's name, type, shape and checksum"
    what_zh = "对每个基座张量的名称、类型、形状和校验和取 SHA-256"
    if after is None:
        return Statement(
            say(
                f"the base's fingerprint after training; before it was {code(before[:16])} ({what_en}).",
                f"训练后基座的指纹；训练前为 {code(before[:16])}（{what_zh}）。",
            ),
            "unmeasured",
        )
    if after == before and has_changed(facts, "base weights"):
        return frozen_since(facts, say)
    if after == before:
        return Statement(
            say(
                f"The base's fingerprint is {code(before[:16])} before training and {code(after[:16])} after it: the "
                f"frozen base did not change ({what_en}).",
                f"基座的指纹，训练前是 {code(before[:16])}，训练后还是 {code(after[:16])}：冻结的基座没有变动"
                f"（{what_zh}）。",
            ),
            "proved",
        )
    return Statement(
        say(
            f"THE FROZEN BASE CHANGED: its fingerprint was {code(before[:16])} before training and is "
            f"{code(after[:16])} after it. The adapter was trained against a moving base; do not use it.",
            f"冻结的基座变了！指纹训练前是 {code(before[:16])}，训练后是 {code(after[:16])}。"
            f"适配器是对着一个变动的基座训练的，请不要使用。",
        ),
        "broken",
    )


def _size(base: Facts, adapter: Facts, size: int, say: Say) -> Statement:
    each = size / max(1, adapter["trainable_parameters"])
    times = base["bytes_16bit"] / max(1, size)
    return Statement(
        say(
            f"The adapter is a file of {size_text(size)}, {each:.2f} bytes for each trained parameter: 1/{times:,.0f} "
            f"of the base in 16 bits.",
            f"适配器文件只有 {size_text(size)}，合每个训练参数 {each:.2f} 字节，是 16 位基座的 1/{times:,.0f}。",
        )
    )


def _verdict(verified: Mapping[str, Any], name: str) -> bool:
    """What was checked holds or doesn't; a text that is taken for true would prove what nobody has seen.

    Raises:
        TypeError: It is neither.
    """
    holds = verified[name]
    if not isinstance(holds, bool):
        raise TypeError(f"verified.{name} is {type(holds).__name__}")
    return holds


def _read_back(facts: Facts, say: Say) -> Section | None:
    if not facts.get("adapter"):
        return None
    verified = facts.get("verified")
    title = say("Read back into a fresh base", "装回全新的基座")
    if not verified:
        text = say(
            "whether the saved adapter loads into a fresh base and changes what it says.",
            "存下的适配器能否装回全新的基座，并改变它的输出。",
        )
        return Section("verified", "", title, (Statement(text, "unmeasured"),))
    difference = value_text(verified["largest_difference"], say)
    checks = (
        (
            _verdict(verified, "keys_match"),
            (
                "Every tensor of the file found its place, and none was left over.",
                "文件里的每个张量都各就各位，不多不少。",
            ),
            ("THE FILE'S TENSORS DO NOT FIT THE MODEL.", "文件里的张量与模型对不上！"),
        ),
        (
            _verdict(verified, "all_finite"),
            ("Every value in it is a finite number.", "其中每个数值都是有限数。"),
            ("IT HOLDS VALUES THAT ARE NO FINITE NUMBERS.", "其中有非有限的数值！"),
        ),
        (
            _verdict(verified, "outputs_differ"),
            (
                f"With the adapter on, logits differ from those with it off by up to {difference}: it has an effect.",
                f"开启与关闭适配器，logits 最多相差 {difference}：它确实在起作用。",
            ),
            ("WITH THE ADAPTER ON, NO LOGIT DIFFERS FROM THOSE WITH IT OFF.", "开启与关闭适配器，logits 毫无差别！"),
        ),
    )
    told = tuple(Statement(say(*(yes if holds else no)), "proved" if holds else "broken") for holds, yes, no in checks)
    return Section("verified", "", title, told)


def _choices(facts: Facts, say: Say) -> Section | None:
    choices = facts.get("choices")
    if choices is None:
        return None
    title = say("Chosen automatically", "自动选择")
    if not choices:
        text = say("Nothing: every value was given.", "没有：所有取值都由使用者给定。")
        return Section("choices", "", title, (Statement(text),))
    rows = tuple(
        (
            code(choice["key"]),
            code(choice["value"]),
            say(plain(choice["reason"]), in_chinese(plain(choice["reason"]))),
        )
        for choice in choices
    )
    header = (say("key", "配置项"), say("value", "取值"), say("because", "理由"))
    text = say(
        "These values were not given; slimtune chose them, and they stand resolved in `config.yaml`.",
        "以下取值没有指定，由 slimtune 选定，并已写进 `config.yaml`。",
    )
    return Section("choices", "", title, (Statement(text),), (), (Table(header, rows),))


def _limits(facts: Facts, say: Say) -> Section | None:
    """What a reader must not take for a measurement."""
    told = []
    if facts.get("base"):
        text_en = "The base's size in 16 bits is arithmetic, 2 bytes a parameter; it was not loaded that way."
        text_zh = "基座的 16 位大小是算出来的（每个参数 2 字节），并没有真的这样载入过。"
        told.append(Statement(say(text_en, text_zh)))
    if facts.get("optimizer"):
        text_en = "So is fp32 Adam's, 8 bytes a parameter; it was not run."
        text_zh = "fp32 Adam 的状态大小也是算出来的（每个参数 8 字节），并没有真的运行过。"
        told.append(Statement(say(text_en, text_zh)))
    if facts.get("training"):
        text_en = "how good the replies are. A loss does not tell; `slimtune compare` and `slimtune eval` do."
        text_zh = "回答得好不好。损失说明不了这一点，请用 `slimtune compare` 和 `slimtune eval` 来衡量。"
        told.append(Statement(say(text_en, text_zh), "unmeasured"))
    else:
        text_en = "the training, as this run did not come to its end."
        text_zh = "训练情况，因为这次运行没有走到终点。"
        told.append(Statement(say(text_en, text_zh), "unmeasured"))
    return Section("limits", "", say("Beyond these figures", "这些数字之外"), tuple(told))
