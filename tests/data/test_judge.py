"""Templates in the style of each published kind, judged with each kind of conversation.

``make templates FOLDER=…`` judges any folder of templates (TEMPLATES_FOLDER; the counts and every verdict that isn't
right go to the file that TEMPLATES_RESULT names).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimtune.data.conversation import RowRefused, normalise
from slimtune.data.render import ChatRenderer, prompt_ids
from tests.data import judge

OWN = Path(__file__).parent / "templates" / "kinds"
FOLDER = Path(os.environ.get("TEMPLATES_FOLDER", OWN))
NEVER_STOPS = {"no-end"}
"""The kinds that are refused whole."""
HEADERS = {
    "no-prompt": "<|im_start|>assistant\n",
    "no-prompt-thinks": "<|im_start|>assistant\n",
    "half-prompt": "assistant\n",
    "words": " ASSISTANT:",
}
"""What the kinds' generation prompts lack."""


@pytest.mark.parametrize("path", sorted(OWN.glob("*.jinja")), ids=lambda path: path.stem)
def test_what_is_trained_is_what_is_asked_and_written(path: Path) -> None:
    verdicts = judge.judged(path.stem, path.read_text(encoding="utf-8"), HEADERS.get(path.stem, ""))
    bad = [v for v in verdicts if v.verdict not in ("right", "refused rightly")]
    assert not bad, "\n".join(f"{v.case}: {v.verdict}: {v.why}" for v in bad)
    right = sum(v.verdict == "right" for v in verdicts)
    assert right == 0 if path.stem in NEVER_STOPS else right >= len(judge.CASES) - 3


@pytest.mark.parametrize("path", sorted(OWN.glob("*.jinja")), ids=lambda path: path.stem)
def test_the_ids_that_a_model_is_asked_with_begin_its_documents(path: Path) -> None:
    if path.stem in NEVER_STOPS:
        pytest.skip("refused whole")
    tokenizer = judge.as_loaded(judge.tokenizer_for(path.read_text(encoding="utf-8")))
    renderer = ChatRenderer(tokenizer)
    held = 0
    for case in judge.CASES:
        try:
            conversation = normalise(case.row())
            drafts = renderer.drafts(conversation)
        except RowRefused:
            continue
        begins = set()
        for ids, mask in renderer.encoder.encode([draft.pieces for draft in drafts]):
            starts = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
            begins |= {tuple(ids[:start].tolist()) for start in starts}
        messages = conversation.messages
        wanted = [at for at, m in enumerate(messages) if m["role"] == "assistant" and m.get("supervised", True)]
        asked = {
            tuple(prompt_ids(tokenizer, messages[:at], tools=case.tools, variables=_known(renderer, case)))
            for at in wanted
        }
        assert begins == asked, case.name
        held += len(asked)
    assert held > len(judge.CASES)


def _known(renderer: ChatRenderer, case: judge.Case) -> dict[str, Any]:
    names = renderer._dialect(False, {}).template.names
    return {name: value for name, value in case.variables.items() if name in names}


@pytest.mark.skipif("TEMPLATES_FOLDER" not in os.environ, reason="the campaign: make templates FOLDER=…")
def test_a_folder_of_templates(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = []
    for path in sorted(FOLDER.glob("**/*.jinja")):
        verdicts += judge.judged(path.stem, path.read_text(encoding="utf-8"))
    counts = Counter(verdict.verdict for verdict in verdicts)
    table = {name: counts[name] for name in judge.VERDICTS}
    shown = [v for v in verdicts if v.verdict not in ("right", "refused rightly")]
    with capsys.disabled():
        print(f"\n{len(verdicts):,} judgements:", ", ".join(f"{count:,} {name}" for name, count in table.items()))
        for verdict in shown:
            print(f"{verdict.template} / {verdict.case}: {verdict.verdict}: {' '.join(verdict.why.split())}")
    if file := os.environ.get("TEMPLATES_RESULT"):
        said = [vars(verdict) for verdict in shown]
        Path(file).write_text(json.dumps({**table, "verdicts": said}, indent=1, ensure_ascii=False), encoding="utf-8")
    assert table["wrong in silence"] == 0
    assert table["refused wrongly"] < 0.02 * len(verdicts)
