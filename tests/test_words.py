"""Chinese for what slimtune says: it is there, holds what the English names, and is shown where Chinese is read."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimtune import hardware
from slimtune.config import Config
from slimtune.engine.read import fits_options
from slimtune.errors import UserError
from slimtune.hardware import CARDS, Hardware, detect
from slimtune.language import language, spoken
from slimtune.plan import (
    check_precision,
    few_steps,
    resolve_amount,
    resolve_held_out,
    resolve_machine,
    resolve_rate,
    resolve_steps,
)
from slimtune.run.lines import base_line, data_line, in_ram_line, memory_line, rehearsed_line, steps_line
from slimtune.training.fused import without_engine
from slimtune.use.parity import Certificate
from slimtune.words import CATALOGUE, Catalogue, catalogue, in_chinese, told
from tests import wording
from tests.test_plan import documents_of

SAME = {"LoRA", "score<0.9, general_change<-0.05, …"}
"""Help that is the same in both, besides commands."""
CODE = {"data: OWNER/NAME:SPLIT", "eval: OWNER/NAME:SPLIT", "train_on: assistant", "data: NAME#500",
        "data: FOLDER:NAME", "slimtune push RUN OWNER/NAME"}  # fmt: skip
"""What is to be written instead, and nothing else."""
COMPOSED = {"off: {} → {}, {}", "{} of {}; a checkpoint {}", "{} rows{}, {} tokens ({} supervised){}"}
"""Lines whose parts are translated each by itself."""


def _in_the_source() -> dict[str, str]:
    """The catalogue's ids that are one text of the source each, with their Chinese."""
    found: dict[str, str] = {}
    for block in CATALOGUE.read_text(encoding="utf-8").split("\n\n"):
        made = Catalogue(block.splitlines())  # type: ignore[arg-type]
        found |= {} if "msgctxt" in block else made.whole
    return found


def test_each_translation_names_what_the_english_names() -> None:
    entries = {**catalogue().whole, **catalogue().parts, **catalogue().cells}
    assert len(entries) > 700
    for english, chinese in entries.items():
        count = english.count("{}")
        fields = [name for _, name, _, _ in string.Formatter().parse(chinese) if name is not None] if count else []
        assert not count or chinese.format(*string.ascii_letters), english  # numbers for all, or for none
        used = set(range(len(fields))) if "" in fields else {int(name) for name in fields}
        assert used == set(range(count)), english


def test_each_text_of_the_catalogue_is_one_of_the_source() -> None:
    said = wording.everything() | wording.of_help()
    assert [text for text in _in_the_source() if text not in said] == []
    kinds = {"config {}", "data {}", "version of {}"}
    cells = {text: {text, text.removeprefix("{}: "), text.removeprefix("data ")} for text in catalogue().cells}
    assert [text for text, forms in cells.items() if text not in kinds and not forms & said] == []


def test_help_screens_and_errors_are_translated() -> None:
    known = catalogue().told
    commands = ("echo '", "slimtune completion")
    assert {text for text in wording.of_help() if known(text) is None and not text.startswith(commands)} <= SAME
    assert {text for text in wording.of_screens() if known(text) is None} <= COMPOSED
    assert [text for text in wording.of_errors() if known(text) is None] == []
    assert len(wording.of_stops()) > 2
    assert [text for text in wording.of_stops() if known(text, part=True) is None] == []
    assert len(wording.of_watched()) > 4
    assert [text for text in wording.of_watched() if known(text, part=True) is None] == []
    assert len(wording.of_rows()) > 30
    assert [text for text in wording.of_rows() if catalogue().told(text, part=True) is None] == []
    cell = catalogue().cell  # some notes stand behind the value that they are about
    assert {text for text in wording.of_notes() if text == cell(text) and f"x: {text}" == cell(f"x: {text}")} == CODE


def _machines(monkeypatch: pytest.MonkeyPatch) -> list[Hardware]:
    """What detect() finds on two CPUs and two GPUs."""
    found = []
    for native in (True, False):
        monkeypatch.setattr(hardware, "_cpu_has_bf16_gemm", lambda native=native: native)
        found.append(detect.__wrapped__())
    card = SimpleNamespace(major=7, minor=5, name="Some GPU", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        found.append(detect.__wrapped__())
    return found


def test_why_a_precision_cant_be_had_is_said_in_chinese_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow, _, old = _machines(monkeypatch)
    asked = [Config.make(model="x", precision=precision) for precision in ("fp8", "bf16")]
    said = [
        why for machine in (fast, slow, old) for config in asked if (why := _refused(resolve_machine, config, machine))
    ]
    said += [
        why for card in ("A100", "V100") for config in asked if (why := _refused(check_precision, config, CARDS[card]))
    ]
    options: list[dict[str, Any]] = [
        {"dora": True}, {"modules_to_save": ["lm_head"]}, {"add_tokens": "x"}, {"rank_pattern": {"x": 1}},
        {"router_aux_loss": 0.1}, {"optim": "adamw_torch"},
    ]  # fmt: skip
    said += [without_engine(fits_options(Config.make(model="x", **each)) or "").what for each in options]
    assert len(said) == 14
    for line in said:
        assert not re.search(r"\b(is|has|so|the|this|for|of|computes|loss)\b", in_chinese(line)), in_chinese(line)


def _refused(check: Callable[..., object], *arguments: object) -> str:
    try:
        check(*arguments)
    except UserError as error:
        return error.what
    return ""


def test_every_choice_and_every_line_of_a_run_has_its_chinese(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: set[str | None] = set()
    few = documents_of(tmp_path / "few", 40)
    for machine in _machines(monkeypatch):
        config, choices = resolve_machine(Config.make(data="rows.jsonl", eval_share=0.1), machine)
        choices += resolve_steps(config, 1000)[1] + resolve_steps(Config.make(epochs=0.3), 8)[1]
        for held in ((Config.make(), 0.2, 40), (Config.make(), 0.0, 12), (Config.make(eval="rows.jsonl"), 0.0, 0)):
            choices += resolve_held_out(*held)[1]
        choices += resolve_amount(Config.make(), few, None)[1] + resolve_rate(Config.make(), 134_515_008)[1]
        choices += resolve_amount(Config.make(), documents_of(tmp_path / "one", 1), None)[1]
        lines |= {choice.reason for choice in choices}
    facts = {"rows": 40, "rows_dropped": 2, "tokens": 1850, "supervised_tokens": 222}
    config = Config.make(save_steps=6, eval_steps=1, gradient_accumulation=1, epochs=3)
    lines |= {
        data_line({**facts, "held_out": {"documents": 8}}), data_line({**facts, "rows_dropped": 0}),
        data_line({**facts, "held_out": {"documents": 8}, "eval": {"trained_on": 3}, "unread": {"id": 4, "a b": 1}}),
        rehearsed_line(96), steps_line(160, config, evaluates=True), steps_line(1, config, evaluates=False),
        base_line(SimpleNamespace(  # type: ignore[arg-type]
            parameters=134_515_008, bytes_16bit=269_030_016, bytes_now=111_500_000, quantization="nf4",
            compute_dtype="bf16",
            parts=[{"part": part, "bytes_now": 56_623_104, "format": "nf4"} for part in ("MLP", "attention", "norms")],
        )),
        memory_line({"weights": 1 << 30, "adapter": 1 << 28, "activations": 1 << 31, "workspace": 1 << 29}, "4GiB"),
        "off: a row's logits change with the other rows by 0.1 of the largest → padded rows, "
        "12 micro-batches of up to 2,048 tokens, 91.0% full",
        in_ram_line(31, 0, 32, 31 << 29), in_ram_line(31, 30, 32, 61 << 29),
        few_steps(config, 5, few), few_steps(Config.make(epochs=1), 1, few),
        *(
            Certificate("a b on its base's own weights", copy, "", 16, 16, 16, 216, 0.995, 9e-4, 1, 0.02, 1, kl).line()
            for copy in ("a b, merged into its base", "a.gguf, read back by Transformers")
            for kl in (None, 0.01)
        ),
    }  # fmt: skip
    assert len(lines) >= 16
    for line in filter(None, lines):
        chinese = in_chinese(line)
        assert re.search("[\u4e00-\u9fff]", chinese), line
        assert not re.search(r"\b(the|of|and|every|steps?|against|its|by)\b", chinese), chinese
        # The figures and names in it are kept.
        figures = [re.findall(r"\d[\d,.]*\d%?|\d%?", text) for text in (line, chinese)]
        assert set(figures[0]) == set(figures[1]), line


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("data a {b}.jsonl does not exist", "数据 a {b}.jsonl 不存在"),
        ("the base of r1: unknown model 'x'", "r1 的基座：没有模型 'x'"),  # what one text names may be another
        ("data/adapter (3.7 MB)", "data/adapter (3.7 MB)"),  # a folder's name is no label
        (
            "shape 2, first a.jsonl:4, field 'messages': text where a list belongs",
            "shape 2 处，第一处 a.jsonl:4，字段 'messages'：这里应是列表，却是文本",
        ),
        (
            "order 1, first a.jsonl:2: the assistant speaks first and answers nobody",
            "order 1 处，第一处 a.jsonl:2：助手先说话，没有回答任何人",
        ),
        ("Mend that. Give the same command again.", "请修正它。请再给一次同样的命令。"),  # sentence by sentence
        ("Go on: slimtune resume 'my run'", "继续：slimtune resume 'my run'"),  # a short one may name words behind it
        (
            "the checkpoint of step 6 could not be saved: No space left on device (my run/checkpoints); there is no "
            "checkpoint yet",
            "第 6 步的检查点没能保存：磁盘已满（my run/checkpoints）；还没有检查点",
        ),
        (
            "the last step can't be saved: 7.0 MiB are needed, and the disk has 3.0 MiB free (my run/checkpoints)",
            "最后一步无法保存：需要 7.0 MiB，磁盘只剩 3.0 MiB（my run/checkpoints）",
        ),
        ("because of \\1 and {}", "because of \\1 and {}"),
        (
            "min 31 · p10 31 · median 1,043 · p90 1,100 · p99 1,100 · max 1,100",
            "最短 31 · p10 31 · 中位 1,043 · p90 1,100 · p99 1,100 · 最长 1,100",
        ),
        ("off: asked for → padded rows, 1 micro-batch", "关闭：按要求 → 补齐的行，1 个微批次"),
        ("6 of 512 tokens, 87.6% full; 2 epochs together", "6 包，每包 512 个 token，填满 87.6%；2 轮合计"),
        (
            "36 of 36 rows can't be trained on (too-long 36); the first: a b.jsonl:4: 108 characters can't fit into "
            "max_length 8 tokens",
            "36 行中有 36 行不能用来训练（too-long 36）；第一处：a b.jsonl:4："
            "108 个字符放不进 max_length 的 8 个 token",
        ),
        (
            "a.csv:2: its columns (a, b) make no known shape; say which columns hold question and reply: "
            "--map instruction=a --map output=b",
            "a.csv:2：它的列（a, b）不是认识的形式；请说明问题和回答在哪些列：--map instruction=a --map output=b",
        ),
        (
            "a.txt:1: text: plain text asks nothing; give prompt or messages",
            "a.txt:1: text：纯文本没有提问；请给出 prompt 或 messages",
        ),
        (
            "precision: fp8 can't be had: FP8 is multiplied on an NVIDIA GPU, and here is none",
            "不能用 precision: fp8：FP8 乘法需要 NVIDIA GPU，这里没有",
        ),
        (
            "the hub did not take a/b: Cannot reach it: offline mode is enabled. To disable it, unset a variable.",
            "hub 没有接受 a/b：Cannot reach it: offline mode is enabled. To disable it, unset a variable.",
        ),
        (
            "preference data (a better reply in 'chosen', a worse one in 'rejected'): --prefer chosen takes the better "
            "one",
            "偏好数据（较好的回答在 'chosen'，较差的在 'rejected'）：--prefer chosen 取较好的一个",
        ),
        ("rank 1: its process is gone", "进程 1：这个进程已经不在了"),
        ("rank 1: data rows.jsonl does not exist", "进程 1：数据 rows.jsonl 不存在"),
        ("rank 1: stopped by a request to rank 2", "进程 1：被 对进程 2 的请求 停止"),
        ("stopped by SIGTERM, and did not end by itself within 4 s", "被 SIGTERM 停止，4 秒内没有自行结束"),
        ("from step 6, 3 changes accepted", "从第 6 步继续，接受了 3 处变化"),
        ("data", "数据"),
    ],
)
def test_texts_that_name_something(english: str, chinese: str) -> None:
    assert in_chinese(english) == chinese


def test_an_entry_may_go_over_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.po"
    file.write_text('msgid ""\n"two "\n"lines"\nmsgstr "两"\n"行"\n#, fuzzy\nmsgid "open"\nmsgstr ""\n', "utf-8")
    with file.open(encoding="utf-8") as lines:
        assert Catalogue(lines).whole == {"two lines": "两行"}


def test_the_locale_decides_unless_a_language_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert language() == "en"
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert (language(), told("data")) == ("zh", "数据")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert language() == "en"
    with spoken("zh"):
        assert told("talk to it") == "与它对话"
    assert str(UserError("no data given")) == "no data given"  # what programs read stays English


def test_each_entry_of_the_catalogue_is_read_and_stands_once() -> None:
    entries = CATALOGUE.read_text(encoding="utf-8").count("\nmsgid ") - 1  # the header's
    assert entries == len(catalogue().whole) + len(catalogue().parts) + len(catalogue().cells)
