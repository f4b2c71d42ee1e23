"""Tasks of lm-evaluation-harness, where it is installed, and what is handed to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtune.errors import UserError
from slimtune.use.load import Opened
from slimtune.use.tasks import _rows, begun_anew, run_tasks
from tests.use.families import greedy, make_opened, make_turning, prompts


def test_tasks_without_the_package_name_the_extra(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm-evaluation-harness") as error:
        run_tasks(opened, ["arc_easy"])
    assert "slimtune[eval]" in error.value.way_out


TASK = """
task: what_colour
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_a_task_of_ones_own(opened: Opened, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="a package of its own")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "What colour is the sky?", "answer": "no such answer"}) + "\n")
    (tmp_path / "own.yaml").write_text(TASK.format(rows=rows))
    results = run_tasks(opened, [str(tmp_path / "own.yaml")])
    assert results["what_colour"]["exact_match,none"] == 0.0
    with pytest.raises(UserError, match="does not exist"):
        run_tasks(opened, [str(tmp_path / "other.yaml")])


TURNS = 40


def test_rows_that_change_each_other_go_alone() -> None:
    assert [_rows(opened) for opened in (make_opened("llama"), make_turning(TURNS), make_opened("cpmant"))] == [8, 1, 1]


class Harness:
    """As ``HFLM`` asks: by the model's own ``generate``, with its cache."""

    def __init__(self, opened: Opened) -> None:
        self.model = opened.model

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        return self.model.generate(input_ids=context, max_length=max_length, use_cache=True, **settings)


@pytest.mark.parametrize("length", [TURNS - 8, TURNS, TURNS + 1])
def test_a_reply_that_becomes_long_is_the_one_without_a_cache(length: int) -> None:
    opened = make_turning(TURNS, "llama")
    (prompt,) = prompts(length)
    model = begun_anew(Harness, TURNS, opened.stop_ids)(opened)
    context = torch.tensor([prompt])
    made = model._model_generate(
        context=context, attention_mask=torch.ones_like(context), stop=[], max_length=length + 16, do_sample=False
    )
    assert made[0, length:].tolist() == greedy(opened, prompt, 16)


def test_long_and_short_questions_are_answered_as_each_alone(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="a package of its own")
    opened = make_turning(70, "llama")
    rows = tmp_path / "rows.jsonl"
    asked = ["What colour is the sky?", "Tell me what colour the sky is on a clear day, and why it is. " * 3]
    own = [opened.prompt_ids([{"role": "user", "content": question}]) for question in asked]
    assert len(own[0]) < 66 < 74 < len(own[1]), [len(each) for each in own]
    answers = [opened.tokenizer.decode(greedy(opened, ids, 4), skip_special_tokens=True) for ids in own]
    lines = [json.dumps({"question": one, "answer": two}) for one, two in zip(asked, answers, strict=True)]
    rows.write_text("\n".join(lines) + "\n")
    (tmp_path / "own.yaml").write_text(TASK.format(rows=rows))
    assert run_tasks(opened, [str(tmp_path / "own.yaml")])["what_colour"]["exact_match,none"] == 1.0
