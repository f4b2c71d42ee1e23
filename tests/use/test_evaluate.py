from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimtune.errors import UserError
from slimtune.use.evaluate import documents_of, losses, run_tasks
from slimtune.use.load import Opened
from tests.use.families import make_opened, make_turning

ROWS = [
    {"instruction": "Say yes.", "output": "Yes."},
    {"instruction": "What is the colour of the sky on a clear day?", "output": "It is blue."},
    {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！有什么可以帮你？"}]},
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return str(file)


def test_losses_are_those_of_each_document_alone(opened: Opened, data: str) -> None:
    documents = documents_of(opened, (data,))
    measured = losses(opened, documents)
    assert len(documents) == 3
    for at in range(3):
        ids, supervised = (torch.from_numpy(np.array(part)).long() for part in documents[at])
        with torch.inference_mode():
            logits = opened.model(ids.view(1, -1).to(opened.device)).logits[0].cpu()
        chosen = supervised[1:].bool()
        by_hand = -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0][chosen]
        assert measured.tokens[at] == len(by_hand) > 2
        assert measured.nats[at] == pytest.approx(float(by_hand.sum()), rel=1e-4)
    with opened.as_base():
        bare = losses(opened, documents)
    assert not np.allclose(bare.nats, measured.nats, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "cpmant", "turning"])
def test_rows_are_padded_only_where_no_logit_changes_by_it(family: str, data: str) -> None:
    """CPM-Ant's attention sees a row's padding; a long row turns the short ones beside it."""
    opened = make_turning(70) if family == "turning" else make_opened(family)
    documents = documents_of(opened, (data,))
    measured = losses(opened, documents)
    assert len(set(documents.lengths)) == 3
    assert min(documents.lengths) < 70 < max(documents.lengths)
    for at, nats in enumerate(measured.nats):
        ids, supervised = (torch.from_numpy(np.array(part)) for part in documents[at])
        with torch.inference_mode():
            logits = opened.model(input_ids=ids.long()[None], use_cache=False).logits[0, :-1]
        lost = nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")[supervised[1:]].sum()
        assert nats == pytest.approx(float(lost), rel=1e-5)


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
