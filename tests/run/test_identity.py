"""At resume, what changed is refused by name, with what it was and is; free keys may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from slimtune.cli import say_error
from slimtune.config import FREE_KEYS, Config
from slimtune.errors import UserError
from slimtune.language import spoken
from slimtune.run.identity import MADE_WITH, Identity, require_same

BEFORE = Identity(
    config=Config(data=("a.jsonl",)).model_dump(mode="json"),
    base="1" * 64,
    data={"a.jsonl": "2" * 64},
    tokenizer="3" * 64,
    template="4" * 64,
    python="3.12.1",
    versions={"torch": "2.11.0", "transformers": "5.17.0"},
)


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return (
        [*value, "more"] if isinstance(value, list) else {"other": 1} if isinstance(value, dict) else f"other-{value}"
    )


@pytest.mark.parametrize("key", sorted(set(Config.model_fields) - FREE_KEYS))
def test_every_key_that_makes_the_numbers_is_refused(key: str) -> None:
    now = dataclasses.replace(BEFORE, config={**BEFORE.config, key: changed(BEFORE.config[key])})
    with pytest.raises(UserError, match=f"config {key}") as refused:
        require_same(BEFORE, now, Path("run"), accept=False)
    assert "--accept-changes" in str(refused.value)
    assert "train --from run" in str(refused.value)
    if key in MADE_WITH:
        with pytest.raises(UserError, match=f"can't go on with another {key}"):
            require_same(BEFORE, now, Path("run"), accept=True)
        return
    (change,) = require_same(BEFORE, now, Path("run"), accept=True)
    assert change.what == f"config {key}"


def test_an_optimizer_may_page_its_state_or_not() -> None:
    before, now = (
        dataclasses.replace(BEFORE, config={**BEFORE.config, "optim": optim})
        for optim in ("paged_adamw_8bit", "adamw_8bit")
    )
    assert len(require_same(before, now, Path("run"), accept=True)) == 1


@pytest.mark.parametrize("key", sorted(FREE_KEYS))
def test_free_keys_may_change(key: str) -> None:
    now = dataclasses.replace(BEFORE, config={**BEFORE.config, key: changed(BEFORE.config[key])})
    assert require_same(BEFORE, now, Path("run"), accept=False) == []


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("base", "9" * 64, "base weights"),
        ("tokenizer", "9" * 64, "tokenizer"),
        ("template", "9" * 64, "chat template"),
        ("python", "3.13.0", "Python"),
        ("data", {"a.jsonl": "9" * 64}, "data a.jsonl"),
        ("data", {}, "data a.jsonl"),
        ("versions", {"torch": "2.15.0", "transformers": "5.17.0"}, "version of torch"),
        ("versions", {"torch": "2.11.0"}, "version of transformers"),
    ],
)
def test_all_else_is_refused_with_from_and_to(field: str, value: Any, what: str) -> None:
    now = dataclasses.replace(BEFORE, **{field: value})
    with pytest.raises(UserError) as refused:
        require_same(BEFORE, now, Path("run"), accept=False)
    assert refused.value.exit_code == 2
    (line,) = [line for line in str(refused.value).splitlines() if line.strip().startswith(what)]
    (change,) = BEFORE.changes(now)
    assert line.split() == [*what.split(), *change.before.split(), *change.after.split()]


def test_what_changed_is_told_in_chinese(capsys: pytest.CaptureFixture[str]) -> None:
    before = dataclasses.replace(
        BEFORE, data={"data.jsonl": "old", "rows beside each answer": "4 times", "a token of an answer": "counts 0.5"}
    )
    config = {**BEFORE.config, "quantization": "none"}
    now = Identity(config, "base", {"data.jsonl": "none"}, "other", "none", "3.13", {"torch": "2.12"})
    with pytest.raises(UserError) as refused:
        require_same(before, now, Path("run"), accept=False)
    with spoken("zh"):
        say_error(refused.value)
    said = capsys.readouterr().err
    assert said.startswith("错误：运行 run 无法照原样继续：有 10 处变化\n")
    assert [line.removeprefix(" " * 8) for line in said.splitlines()[1:12]] == [
        "                        检查点时           现在",
        "配置 quantization       nf4                none",
        "数据：回答的每个 token  按 0.5 计          —",
        "数据 data.jsonl         old                none",
        "数据：每个回答旁的样本  4 遍               —",
        "基座权重                1111111111111111…  base",
        "聊天模板                4444444444444444…  none",
        "分词器                  3333333333333333…  other",
        "Python                  3.12.1             3.13",
        "torch 的版本            2.11.0             2.12",
        "transformers 的版本     5.17.0             —",
    ]


def test_an_identity_survives_its_file() -> None:
    assert Identity.from_bytes(BEFORE.to_bytes()) == BEFORE
