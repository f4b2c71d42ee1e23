from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimtune.use.evaluate import documents_of, losses
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
