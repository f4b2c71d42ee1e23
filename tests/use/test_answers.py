from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import UserError
from slimtune.use import answers
from slimtune.use.answers import answer_file
from slimtune.use.load import Opened
from slimtune.use.questions import read_questions
from slimtune.use.sampling import Sampling

SHORT = Sampling(max_new_tokens=5)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows: list[Any] = [
        {"prompt": "Say hello."},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]},
        {"instruction": "Add.", "input": "1 + 1"},
        {"instruction": "Name a colour.", "output": "Red"},
        "Just text",
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_of_every_shape_are_questions(prompts: Path) -> None:
    questions = read_questions(str(prompts))
    assert [question.messages[-1]["content"] for question in questions] == [
        "Say hello.",
        "Who are you?",
        "Add.\n1 + 1",
        "Name a colour.",
        "Just text",
    ]
    assert [question.reference for question in questions] == [None, None, None, "Red", None]


@pytest.mark.parametrize("row", ['{"prompt": ""}', '{"wrong": 1}', "3", '{"prompt": "x"', '{"text": "x"}'])
def test_a_row_that_asks_nothing_is_named(row: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + row + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl:2"):
        read_questions(str(file))


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    opened: Opened, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = read_questions(str(prompts))
    drawn = Sampling(temperature=1.0, max_new_tokens=5, seed=7)
    assert answer_file(opened, questions, tmp_path / "whole.jsonl", drawn, with_base=True) == 0
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [row["index"] for row in whole] == list(range(5))
    assert all(row["reply_tokens"] <= 5 for row in whole)
    assert any(row["reply"] != row["base_reply"] for row in whole)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        assert total == 10
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        answer_file(opened, questions, tmp_path / "cut.jsonl", drawn, with_base=True, on_progress=kill)
    partial = tmp_path / "cut.jsonl.partial"
    partial.write_bytes(partial.read_bytes() + b'{"index": 4, "si')  # as a kill inside a line leaves it
    assert not (tmp_path / "cut.jsonl").exists()
    asked: list[int] = []
    plain = answers.generate

    def counted(opened: Opened, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(prompts))
        return plain(opened, prompts, *args, **kwargs)

    monkeypatch.setattr(answers, "generate", counted)
    assert answer_file(opened, questions, tmp_path / "cut.jsonl", drawn, with_base=True) == 3
    assert sum(asked) == 7
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()


def test_answers_that_were_made_otherwise_are_not_mixed(opened: Opened, prompts: Path, tmp_path: Path) -> None:
    questions = read_questions(str(prompts))[:1]
    output = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text('{"settings": {"sampling": "other"}}\n')
    with pytest.raises(UserError, match="other options"):
        answer_file(opened, questions, output, SHORT)
    output.write_text("kept")
    with pytest.raises(UserError, match="exists"):
        answer_file(opened, questions, output, SHORT)
    assert output.read_text() == "kept"


def test_a_base_in_other_bits_or_another_rendering_is_another_model(
    opened: Opened, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = read_questions(str(prompts))[:2]

    assert opened.format == "nf4"
    with monkeypatch.context() as patch:
        patch.setattr(answers, "replace_file", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer_file(opened, questions, tmp_path / "out.jsonl", SHORT)
    asked_otherwise = deepcopy(opened.tokenizer)
    asked_otherwise.chat_template = str(opened.tokenizer.chat_template).replace("helpful", "kind")
    for other in (replace(opened, format="none"), replace(opened, tokenizer=asked_otherwise)):
        with pytest.raises(UserError, match="made with another model, other prompts or other options"):
            answer_file(other, questions, tmp_path / "out.jsonl", SHORT)
    assert answer_file(opened, questions, tmp_path / "out.jsonl", SHORT) == 2


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["{\n", "[]\n", '"x"\n', '{"other": 1}\n', '{"settings": 1}\n{"index": 0}\n'])
def test_a_partial_file_of_anothers_is_refused(text: str, opened: Opened, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").write_text(text)
    with pytest.raises(UserError, match="as slimtune wrote it"):
        answer_file(opened, read_questions(str(prompts))[:1], tmp_path / "out.jsonl", SHORT)
    assert (tmp_path / "out.jsonl.partial").read_text() == text


def test_parts_of_a_file_answer_what_the_whole_does(opened: Opened, prompts: Path, tmp_path: Path) -> None:
    """Drawn replies too: they follow from a prompt's place in its file, not from the part that it is in."""
    questions, drawn = read_questions(str(prompts)), Sampling(temperature=1.0, max_new_tokens=5, seed=7)
    answer_file(opened, questions, tmp_path / "whole.jsonl", drawn)
    lines: list[str] = []
    for part in (slice(0, None, 2), slice(1, None, 2), slice(7, None, 8)):
        output = tmp_path / f"{part.start}.jsonl"
        answer_file(opened, questions[part], output, drawn, numbers=range(5)[part])
        lines += output.read_text().splitlines()
    assert (
        sorted(lines, key=lambda line: json.loads(line)["index"]) == (tmp_path / "whole.jsonl").read_text().splitlines()
    )
