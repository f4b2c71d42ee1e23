from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimtune.errors import GuardStop, UserError
from slimtune.run.interval import bootstrap
from slimtune.use.compare import Comparison, Item, compare, exact_match, fail_if, load_checker
from slimtune.use.compare_page import comparison_page, marked
from slimtune.use.general import GENERAL
from slimtune.use.generate import generate
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling

SHORT = Sampling(max_new_tokens=12)


def _item(part: str, before: float, after: float) -> Item:
    return Item(part, f"asked <b>{before}", "reference", "said before", "said & <script>now", before, after)


@pytest.fixture
def made() -> Comparison:
    items = [_item("held-out", *scores) for scores in ((0, 1), (0, 1), (1, 1), (1, 0))]
    return Comparison("run", "base/of-it", [*items, _item("general", 1, 0)], None, None, None)


def test_each_side_is_scored_on_its_own_replies(opened: Opened, tmp_path: Path) -> None:
    asked = ["What is your name?", "Say hello.", "Describe the sea.", "Name a bird and a tree.", "Why is it so?"]
    prompts = [opened.prompt_ids([{"role": "user", "content": text}]) for text in asked]
    tuned = {reply.index: reply.text for reply in generate(opened, prompts, SHORT)}
    with opened.as_base():
        bare = {reply.index: reply.text for reply in generate(opened, prompts, SHORT)}
    differs = next(index for index in tuned if tuned[index] != bare[index])
    # The first row's answer is what the tuned model alone says, the second's is what nobody says.
    rows = [
        {"prompt": asked[differs], "completion": tuned[differs]},
        {"prompt": asked[0], "completion": "zzz"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare(opened, str(file), general=False, sampling=SHORT)
    first, second = comparison.items
    assert (first.reply, first.base_reply) == (tuned[differs], bare[differs])
    assert (first.base_score, first.score) == (0.0, 1.0)
    assert (second.base_score, second.score) == (0.0, 0.0)
    numbers = comparison.numbers()
    assert (numbers["score"], numbers["base_score"], numbers["wins"], numbers["losses"]) == (0.5, 0.0, 1, 0)
    assert comparison.loss is not None
    assert comparison.base_loss is not None
    assert comparison.loss_change is not None
    assert comparison.loss_change.value == pytest.approx(comparison.loss.value - comparison.base_loss.value)


def test_counts_rows_and_what_got_worse(made: Comparison) -> None:
    numbers = made.numbers()
    assert (numbers["wins"], numbers["losses"], numbers["general_losses"]) == (2, 1, 1)
    assert numbers["change"] == pytest.approx(0.25)
    assert [item.part for item in made.worse()] == ["held-out", "general"]
    assert made.rows()[1][3] == "2 better · 1 worse · 1 same"


def test_the_page_escapes_what_models_say(made: Comparison) -> None:
    page = comparison_page(made, "en")
    assert "asked &lt;b&gt;" in page
    assert "&lt;script&gt;now</mark>" in page
    assert "<script" not in page
    assert "Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">" in page


def test_the_page_marks_what_the_other_reply_has_not_and_folds_what_is_long() -> None:
    assert marked("It is the shed.", "It is a shed.") == [("It is ", False), ("the", True), (" shed.", False)]
    assert marked("在棚子下", "在桌子下") == [("在", False), ("棚", True), ("子下", False)]
    assert "".join(text for text, _ in marked("a\n b  c", "")) == "a\n b  c"
    long = Item("held-out", "asked", "expected", "word " * 200, "short", 0, 1, (("system", "Be brief."),))
    page = comparison_page(Comparison("run", "base", [long], None, None, None), "zh")
    assert page.count('class="text fold"') == page.count('type="checkbox"') == 1
    assert "Be brief." in page
    assert '<html lang="zh-CN">' in page


def test_what_is_expected_is_told_in_words_and_its_rule_accepts_it() -> None:
    for question in GENERAL:
        assert not set("\\?*|^") & set(question.expected)
        answers = ["red, blue, green"] if "three words" in question.expected else question.expected.split(" / ")
        assert all(map(question.is_right, answers)), question


@pytest.mark.parametrize("condition", ["score<0.76", "losses >= 1", "general_change<-0.5"])
def test_a_condition_that_holds_stops(made: Comparison, condition: str) -> None:
    with pytest.raises(GuardStop):
        fail_if(made, [condition])


def test_conditions_that_do_not_hold_pass_and_wrong_ones_are_refused(made: Comparison) -> None:
    fail_if(made, ["score<0.75", "losses>1"])
    with pytest.raises(UserError, match="there is no loss"):
        fail_if(made, ["loss>1"])
    with pytest.raises(UserError, match="score=1"):
        fail_if(made, ["score=1"])


def test_a_checker_is_a_function_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "check.py"
    file.write_text("def loose(reply, reference):\n    return reply.lower() == reference.lower()\n")
    assert load_checker(f"{file}:loose")("YES", "yes")
    assert exact_match(" yes\n", "yes") == 1.0
    assert exact_match("yes!", "yes") == 0.0
    for wrong in (f"{file}:none", f"{tmp_path}/gone.py:loose", "loose"):
        with pytest.raises(UserError):
            load_checker(wrong)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("What is 7 + 5?", "It is 12.", "It is 112."),
        ("What is the past tense of the verb 'go'?", "Went", "goed"),
        ("把“猫”翻译成英文。", "cat", "catalogue"),
        ("Write the word 'stone' in capital letters.", "STONE", "stone"),
        ("Repeat this word exactly once and write nothing else: lantern", "Lantern.", "lantern lantern"),
        ("Count from 1 to 5.", "1, 2, 3, 4, 5", "1, 2, 4, 5"),
    ],
)
def test_the_general_sets_rules_know_right_from_wrong(text: str, right: str, wrong: str) -> None:
    question = next(question for question in GENERAL if question.text == text)
    assert question.is_right(right)
    assert not question.is_right(wrong)


def test_equal_sides_have_no_interval_around_nothing(made: Comparison) -> None:
    import numpy as np

    assert bootstrap(np.zeros(5)).value == 0.0
    assert len({(question.kind, question.text) for question in GENERAL}) == len(GENERAL) == 44
