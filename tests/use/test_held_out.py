"""The rows that a run held out are found again by eval and compare, and are those that it was judged on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slimtune.cli import slimtune_command
from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.recipes import finetune
from slimtune.run.folder import RunFolder
from slimtune.use.compare import compare
from slimtune.use.evaluate import losses
from slimtune.use.held_out import held_out_of
from slimtune.use.load import Opened, open_model
from slimtune.use.sampling import Sampling


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, requests_file: Path) -> Path:
    """Sixty rows: eight are held out, each a part by itself."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(requests_file.read_text("utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> RunFolder:
    config = Config.make(
        model=str(tiny_model), data=str(rows), output=tmp_path_factory.mktemp("runs") / "run", max_steps=6,
        max_length=128, gradient_accumulation=1, learning_rate=1e-2, compute_dtype="fp32",
    )  # fmt: skip
    return finetune(config)


@pytest.fixture(scope="module")
def tuned(run: RunFolder) -> Opened:
    return open_model(str(run.path), dtype="fp32")


def test_the_verdict_is_what_eval_measures(run: RunFolder, tuned: Opened) -> None:
    verdict = run.read_json(run.facts_file)["verdict"]
    assert (verdict["documents"], verdict["step"], verdict["outcome"]) == (8, 6, "better")
    documents = held_out_of(tuned).documents
    assert losses(tuned, documents).mean().value == pytest.approx(verdict["end"]["value"], rel=1e-4)
    with tuned.as_base():
        assert losses(tuned, documents).mean().value == pytest.approx(verdict["start"]["value"], rel=1e-4)


def test_they_are_asked_as_they_stand_in_the_data(tuned: Opened, rows: Path) -> None:
    held = held_out_of(tuned)
    lines = rows.read_text("utf-8").splitlines()
    asked = {question.place: question for question in held.questions()}
    assert len(asked) == len(held.documents) == 8
    for place, question in asked.items():
        *before, reply = json.loads(lines[int(place.rpartition(":")[2]) - 1])["messages"]
        assert question.messages[-1]["content"] == before[-1]["content"]
        assert question.reference == reply["content"]
    made = compare(tuned, held, general=False, sampling=Sampling(max_new_tokens=1))
    assert len(made.part("held-out")) == 8
    assert made.loss_change is not None
    assert made.loss_change.high < 0


def test_other_rows_are_refused(run: RunFolder, tuned: Opened, rows: Path, tmp_path: Path) -> None:
    text = rows.read_text("utf-8")
    try:
        rows.write_text(text.replace("the", "a"), encoding="utf-8")
        with pytest.raises(UserError, match="aren't what they were"):
            held_out_of(tuned)
        rows.rename(rows.with_suffix(".away"))
        with pytest.raises(UserError, match=r"can't be found again: data .* does not exist(.|\n)*Give DATA"):
            held_out_of(tuned)
    finally:
        rows.write_text(text, encoding="utf-8")
    bare = shutil.copytree(run.adapter, tmp_path / "adapter")
    with pytest.raises(UserError, match="nothing to evaluate on"):
        slimtune_command.main(args=["eval", str(bare)], standalone_mode=False)
