"""What explain says is what the files hold; what doesn't hold is said so; both languages say the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import slimtune
from slimtune.run.explain import explain
from slimtune.run.folder import RunFolder
from slimtune.run.screen import size_text
from slimtune.run.statement import Explanation, Section

Facts = dict[str, Any]
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture
def facts(finished_run: RunFolder) -> Facts:
    return copy.deepcopy(finished_run.read_json(finished_run.facts_file))


def section(story: Explanation, key: str) -> Section:
    return next(section for section in story.sections if section.key == key)


def texts(story: Explanation, key: str) -> str:
    return "\n".join(statement.text for statement in section(story, key).statements)


def verdicts(story: Explanation) -> dict[tuple[str, int], str]:
    return {
        (section.key, number): statement.status
        for section in story.sections
        for number, statement in enumerate(section.statements)
    }


def test_a_sound_run_has_nothing_broken(facts: Facts) -> None:
    story = explain(facts)
    assert story.count("broken") == 0
    proved = {key for (key, _), status in verdicts(story).items() if status == "proved"}
    assert proved == {"base", "data", "wrapping", "training", "verdict", "optimizer", "saving", "verified"}
    parts = list(dict.fromkeys(section.part for section in story.sections if section.part))
    assert [part[:6] for part in parts] == ["Part 1", "Part 2", "Part 3", "Part 4"]


def test_its_numbers_are_those_of_the_files(facts: Facts, finished_run: RunFolder) -> None:
    story = explain(facts)
    file = finished_run.adapter / "adapter_model.safetensors"
    with safe_open(file, "pt") as tensors:
        values = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - not a dict
    trained = sum(rows * columns for rows, columns in values)
    assert f"{trained:,} of " in texts(story, "wrapping")
    assert f"{len(values) // 2} modules carry an adapter" in texts(story, "wrapping")
    assert f"file of {size_text(file.stat().st_size)}, {file.stat().st_size / trained:.2f} bytes" in texts(
        story, "saving"
    )
    for saved in finished_run.adapter.iterdir():
        assert f"`{saved.name}`" in texts(story, "saving")
    steps = [record for record in finished_run.metrics() if "loss" in record]
    assert f"{len(steps)} optimizer steps" in texts(story, "training")
    assert f"{sum(record['tokens'] for record in steps):,} tokens" in texts(story, "training")
    evaluations = [record["eval_loss"] for record in finished_run.metrics() if "eval_loss" in record]
    assert f"loss {evaluations[0]:.4g} → {evaluations[-1]:.4g}" in texts(story, "verdict")
    config = finished_run.config()
    rows = {row[0]: row[1] for row in section(story, "choices").tables[0].rows}
    assert rows["`compute_dtype`"] == f"`{config.compute_dtype}`"
    assert rows["`optim`"] == f"`{config.optim}`"


def test_nobody_wraps_the_model_by_hand() -> None:
    """The claim that the wrapping is SFTTrainer's work: get_peft_model is called for the plan's skeleton alone."""
    texts = {file.name: file.read_text("utf-8") for file in Path(slimtune.__file__).parent.rglob("*.py")}
    assert [name for name, text in texts.items() if re.search(r"(?<![.`\w])get_peft_model\(", text)] == ["lora.py"]
    takers = re.compile(r"from slimtune\.adapter\.lora import [^\n]*\bwrapped\b")
    assert [name for name, text in texts.items() if takers.search(text)] == ["forecast.py"]


def set_in(*path: str, value: Any) -> Callable[[Facts], None]:
    def change(facts: Facts) -> None:
        for key in path[:-1]:
            facts = facts[key]
        facts[path[-1]] = value

    return change


def add_file(name: str) -> Callable[[Facts], None]:
    return lambda facts: facts["adapter"]["folder_files"].append(name)


def unquantised(facts: Facts) -> None:
    for part in facts["base"]["parts"]:
        part["bytes_now"] = 4 * part["parameters"]


BROKEN: list[tuple[Callable[[Facts], Any], str, str]] = [
    (unquantised, "base", "no part of it lies in 4 bits"),
    (set_in("data", "rows_trained", value=3), "data", "THE ACCOUNT DOES NOT BALANCE"),
    (set_in("data", "eval", value={"rows": 5, "rows_trained": 3, "rows_dropped": 1}), "data", "DOES NOT BALANCE"),
    (set_in("adapter", "class_after", value="LlamaForCausalLM"), "wrapping", "THE MODEL WAS NOT WRAPPED"),
    (lambda facts: facts["adapter"]["modules"].pop("k_proj"), "wrapping", "not found: `k_proj`"),
    (set_in("optimizer", "parameters", value=7), "optimizer", "THESE DIFFER"),
    (set_in("base", "fingerprint_after", value="0" * 64), "saving", "THE FROZEN BASE CHANGED"),
    (add_file("model.safetensors"), "saving", "OTHER WEIGHTS AMONG THEM: `model.safetensors`"),
    (add_file("pytorch_model.bin"), "saving", "OTHER WEIGHTS AMONG THEM: `pytorch_model.bin`"),
    (lambda facts: facts["adapter"]["folder_files"].remove("adapter_model.safetensors"), "saving", "MISSING"),
    (set_in("training", "last_loss", value=float("nan")), "training", "is not a finite number"),
    (set_in("verdict", "outcome", value="worse"), "verdict", "WORSE than before the training"),
    (set_in("verified", "keys_match", value=False), "verified", "DO NOT FIT"),
    (set_in("verified", "all_finite", value=False), "verified", "NO FINITE NUMBERS"),
    (set_in("verified", "outputs_differ", value=False), "verified", "NO LOGIT DIFFERS"),
]


@pytest.mark.parametrize(("change", "key", "said"), BROKEN)
def test_what_does_not_hold_is_said_loudly(facts: Facts, change: Callable[[Facts], Any], key: str, said: str) -> None:
    change(facts)
    for lang in ("en", "zh"):
        story = explain(facts, lang)
        broken = [where for (where, _), status in verdicts(story).items() if status == "broken"]
        assert broken == [key]
    assert said in texts(explain(facts), key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_in("base", "fingerprint_after", value=None), "the base's fingerprint after training"),
        (set_in("adapter", "file_bytes", value=None), "the saved adapter's size"),
        (set_in("optimizer", "state_bytes", value={}), "the state of `adamw_8bit`"),
        (set_in("verified", value=None), "whether the saved adapter loads into a fresh base"),
        (set_in("verdict", value={"outcome": "unmeasured"}), "on rows that it hasn't seen"),
        (set_in("training", value=None), "the training, as this run did not come to its end"),
    ],
)
def test_what_was_not_measured_is_said_so(facts: Facts, change: Callable[[Facts], Any], said: str) -> None:
    facts["optimizer"]["state_bytes"] = {"uint8": 8}
    assert not [text for text in unmeasured(facts) if said in text]
    change(facts)
    assert [text for text in unmeasured(facts) if said in text]
    assert explain(facts).count("broken") == 0


def unmeasured(facts: Facts) -> list[str]:
    statements = [statement for section in explain(facts).sections for statement in section.statements]
    return [statement.text for statement in statements if statement.status == "unmeasured"]


@pytest.mark.parametrize("missing", ["adapter", "training", "optimizer", "verified", "data", "choices"])
def test_a_run_that_ended_early_is_told_as_far_as_it_came(facts: Facts, missing: str) -> None:
    facts[missing] = None
    assert explain(facts).sections
    del facts[missing]
    assert explain(facts, "zh").sections
    assert explain({"run": "x"}).count("broken") == 0


def test_plain_lora_is_not_called_quantised(facts: Facts) -> None:
    facts["base"]["quantization"] = "none"
    unquantised(facts)
    story = explain(facts)
    assert story.count("broken") == 0
    assert "It was not quantised" in texts(story, "base")


def adapt_experts(facts: Facts) -> None:
    facts["adapter"].update(
        expert_parameters=629_145_600, targets=["v_proj", "experts"], modules={"v_proj": 2, "experts.gate_up_proj": 2}
    )


def test_experts_are_told(facts: Facts) -> None:
    adapt_experts(facts)
    story = explain(facts)
    assert "629,145,600 of them are for the experts" in texts(story, "wrapping")
    assert "2 of 2 layers" in texts(story, "wrapping")
    assert story.count("broken") == 0


def forget(facts: Facts) -> None:
    facts["data"]["rehearsed"] = {"wanted": 24, "documents": 20, "tokens": 1234, "rounds": 2, "weight": 0.25}
    change = {"value": -0.4, "low": -0.5, "high": -0.3}
    facts["verdict"] |= {
        "outcome": "worse", "by_replies": True, "answered": 3, "stuck": 2, "stuck_reply": "abre `abre` " * 9,
        "general": {"questions": 44, "before": 21, "after": 3, "change": change},
    }  # fmt: skip


def test_what_was_forgotten_and_what_repeats_is_told(facts: Facts) -> None:
    forget(facts)
    told = explain(facts)
    assert "20 general prompts" in texts(told, "data")
    assert f"were trained on, {facts['training']['epochs'] / 2:.3g} times each" in texts(told, "data")
    assert "times each, a token counting 0.25 of a row's" in texts(told, "data")
    assert "are supervised: of theirs only these make the loss" in texts(told, "data")
    assert "2 epochs are" in texts(told, "data")
    verdict = texts(told, "verdict")
    assert "2 of 3 replies to held-out prompts repeat themselves" in verdict
    assert "abre 'abre' abre" in verdict
    assert "had 21 right, the model has 3" in verdict
    assert told.count("broken") == 1


def go_on_changed(facts: Facts) -> None:
    facts["data"]["rehearsed"] = {"wanted": 24, "documents": 20, "tokens": 1234, "rounds": 2, "weight": 0.25}
    facts["changes"] = [
        {"step": 4, "what": "config learning_rate", "before": "0.01", "after": "0.005"},
        {"step": 8, "what": "data a token of an answer", "before": "—", "after": "counts 0.25"},
        {"step": 8, "what": "base weights", "before": "0123…", "after": "4567…"},
    ]


def test_what_held_from_which_step_on_is_told(facts: Facts) -> None:
    """Whatever was accepted: no setting that came last is told as if it had held for the whole run."""
    before = explain(facts)
    go_on_changed(facts)
    told, chinese = explain(facts), explain(facts, "zh")
    assert "After steps 4 and 8 the run went on although 3 things had changed" in texts(told, "changes")
    assert section(told, "changes").tables[0].rows == (
        ("config learning_rate", "0.01", "0.005", "5"),
        ("data a token of an answer", "—", "counts 0.25", "9"),
        ("base weights", "0123…", "4567…", "9"),
    )
    assert section(chinese, "changes").tables[0].rows[1] == ("数据：回答的每个 token", "—", "按 0.25 计", "9")
    for key in ("base", "data", "lora", "optimizer", "choices"):
        assert section(told, key).statements[0].text == "From step 9 on:"
        assert section(chinese, key).statements[0].text == "从第 9 步起："
    assert "(last engine: " in texts(told, "training")
    assert "times each" not in texts(told, "data")  # nor how often over the whole run
    assert "same command" in texts(before, "training")
    assert "same command" not in texts(told, "training")
    assert "the frozen base did not change" in texts(before, "saving")
    assert "Before that step the adapter was trained against another base" in texts(told, "saving")
    facts["training"]["steps"] = 8
    assert section(explain(facts), "lora").statements[0].text.startswith("With this no step was trained")


def go_on_with_others(facts: Facts) -> None:
    facts["training"]["ranks"] = 3
    facts["ranks"] = [{"step": 4, "before": 2, "after": 1}, {"step": 8, "before": 1, "after": 3}]


def test_how_many_processes_trained_from_which_step_on_is_told(facts: Facts) -> None:
    facts["training"]["ranks"] = 3
    assert "3 processes trained it together" in texts(explain(facts), "training")
    go_on_with_others(facts)
    told = "trained by 2 processes from step 1 on, 1 process from step 5 on and 3 processes from step 9 on"
    assert told in texts(explain(facts), "training")
    assert "same command" not in texts(explain(facts), "training")
    facts["training"]["steps"] = 8  # with the last ones nothing was trained
    assert "2 processes from step 1 on and 1 process from step 5 on," in texts(explain(facts), "training")


@pytest.mark.parametrize(
    "change",
    [lambda facts: None, adapt_experts, forget, go_on_changed, go_on_with_others, *(change for change, _, _ in BROKEN)],
)
def test_both_languages_say_the_same_numbers(facts: Facts, change: Callable[[Facts], Any]) -> None:
    change(facts)
    english, chinese = explain(facts, "en"), explain(facts, "zh")
    assert verdicts(english) == verdicts(chinese)
    for one, other in zip(english.sections, chinese.sections, strict=True):
        assert not CHINESE.search(one.title)
        assert CHINESE.search(other.title)
        for left, right in zip(one.statements, other.statements, strict=True):
            assert not CHINESE.search(left.text)
            assert CHINESE.search(right.text)
            assert numbers(left.text) == numbers(right.text)
        for bars in zip(one.bars, other.bars, strict=True):
            assert len({(bar.text, *(size for _, size in bar.pieces)) for bar in bars}) == 1
        for tables in zip(one.tables, other.tables, strict=True):
            assert len({tuple(row[column] for row in table.rows for column in table.numbers) for table in tables}) == 1


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,.:]*\d|\d", re.sub(r"[a-z]\d|SHA-256", "", text)))


@pytest.mark.parametrize("value", ["yes", 1, None, [1]])
def test_a_verdict_is_true_or_false_and_nothing_else(facts: Facts, value: Any) -> None:
    facts["verified"]["outputs_differ"] = value
    with pytest.raises(TypeError, match="outputs_differ"):
        explain(facts, "en")


def test_a_name_cannot_forge_code_or_lines(facts: Facts) -> None:
    facts["base"]["model"] = "a`b\n# c"
    assert "`a'b # c`" in texts(explain(facts), "base")


def test_a_model_whose_work_cant_be_counted_has_no_speed_to_measure_it_by(facts: Facts) -> None:
    facts["training"]["floor_share"] = facts["training"]["model_flops_per_second"] = None
    assert "TFLOP" not in texts(explain(facts), "training")
    assert "how much work a token is" in texts(explain(facts), "training")
    assert explain(facts).count("broken") == 0


def test_what_was_not_read_and_what_was_on_both_sides_is_told_in_both_languages(facts: Facts) -> None:
    assert "weren't read" not in texts(explain(facts), "data")
    rows = {"rows": 9, "rows_trained": 9, "rows_dropped": 0}
    facts["data"] |= {"unread": {f"column{at}": 1 for at in range(7)}, "eval": {**rows, "trained_on": 4}}
    for language, both in (("en", " 4 of its documents were left out"), ("zh", "4 篇文档也在训练数据里")):
        told = texts(explain(facts, language), "data")
        assert "column0, column1, column2, column3, column4, …" in told
        assert both in told


def test_adapters_without_a_gradient_are_named(facts: Facts) -> None:
    assert "every adapter got a gradient" in texts(explain(facts), "training")
    facts["training"]["without_gradient"] = ["model.vision.q_proj", "model.vision.k_proj"]
    assert "2 adapters got no gradient" in texts(explain(facts), "training")
    assert "model.vision.k_proj" in texts(explain(facts, lang="zh"), "training")


def test_inputs_that_waited_in_ram_are_told_in_both_languages(facts: Facts) -> None:
    assert "RAM" not in texts(explain(facts), "training")
    facts["training"] |= {"memory_kind": "gpu peak allocated", "ram_layers": 31, "ram_bytes": 31 << 29}
    for language in ("en", "zh"):
        told = texts(explain(facts, language), "training")
        assert "31" in told
        assert size_text(31 << 29) in told


def test_compared_kernels_are_told_in_both_languages(facts: Facts) -> None:
    facts["training"]["attention"] = {"cuDNN's attention": False, "PyTorch's FlashAttention-2": True}
    for language, right, wrong in (("en", "computed what", "left out"), ("zh", "一致", "没有采用")):
        told = texts(explain(facts, language), "training")
        (line,) = (line for line in told.splitlines() if "FlashAttention-2" in line)
        assert right in line
        (line,) = (line for line in told.splitlines() if "cuDNN" in line)
        assert wrong in line


def test_streamed_weights_are_told_in_both_languages(facts: Facts) -> None:
    facts["training"] |= {"memory_kind": "gpu peak allocated", "streamed_layers": 77, "streamed_bytes": 77 << 28}
    for language in ("en", "zh"):
        told = texts(explain(facts, language), "training")
        assert "77" in told
        assert size_text(77 << 28) in told
