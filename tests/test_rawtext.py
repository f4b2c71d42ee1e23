"""Raw text through the recipes: without a chat template, from a pipe, and resumed with the same data only."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest

from slimtune.config import Config
from slimtune.data.render import prompt_ids
from slimtune.errors import UserError
from slimtune.recipes import finetune, resume
from slimtune.use.evaluate import documents_of, losses
from slimtune.use.load import open_model
from tests.campaigns import campaign

BOOK = "\n\n".join(f"Page {n}. The old door stands by the river, and {n} gardens are white." for n in range(40))


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base whose tokenizer has no chat template."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = campaign.make_model(tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    return str(folder)


def config(model: str, data: str, run: Path, **more: object) -> Config:
    return Config.make(model=model, data=data, output=run, max_length=256, learning_rate=1e-3, lora_dropout=0.0,
                       compute_dtype="fp32", **{"max_steps": 3, **more})  # fmt: skip


def test_raw_text_from_a_pipe_needs_no_template_and_stays_in_the_run(
    tmp_path: Path, bare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BOOK.encode())))
    run = finetune(config(bare, "-", tmp_path / "run", save_steps=1, format="text"))
    assert run.config().data == (str(tmp_path / "run" / "stdin" / "stdin.txt"),)
    assert (run.path / "stdin" / "stdin.txt").read_text() == BOOK
    assert run.read_json(run.facts_file)["data"]["shapes"] == {"text": 40}

    opened = open_model(str(run.path), dtype="fp32")
    held = tmp_path / "held.txt"
    held.write_text("Page 99. The old door stands by the river.")
    assert losses(opened, documents_of(opened, (str(held),))).mean().value > 0
    with pytest.raises(UserError, match="has no chat template"):
        prompt_ids(opened.tokenizer, [{"role": "user", "content": "Hi"}])

    assert resume(run.path).path == run.path  # done already; its data is the kept file
    with pytest.raises(UserError, match="has no chat template") as refused:
        finetune(config(bare, str(_chat(tmp_path)), tmp_path / "other"))
    assert "--template FILE.jinja" in refused.value.way_out
    assert not (tmp_path / "other").exists()


def test_a_folder_with_another_file_is_other_data_at_a_resume(tmp_path: Path, bare: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.txt").write_text(BOOK)
    run = finetune(config(bare, str(folder), tmp_path / "run", save_steps=1))
    (folder / "b.txt").write_text("Another page.")
    shutil.rmtree(run.adapter)  # a finished run stays as it is
    with pytest.raises(UserError, match=r"can't go on as it was: 1 thing changed\n(.|\n)*data .*rows"):
        resume(run.path)
    (folder / "b.txt").unlink()
    resume(run.path)


def _chat(folder: Path) -> Path:
    file = folder / "chat.jsonl"
    file.write_text('{"prompt": "Hi", "completion": "Hello."}\n')
    return file
