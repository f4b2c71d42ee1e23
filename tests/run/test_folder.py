"""What a run's folder says of itself, if somebody has changed it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.run.folder import RunFolder


@pytest.mark.parametrize("part", ["verdict", "base", "data"])
@pytest.mark.parametrize("value", ["../elsewhere", ["worse"], 7, True])
def test_parts_of_the_facts_that_are_no_objects_are_told(tmp_path: Path, part: str, value: object) -> None:
    run = RunFolder(tmp_path)
    run.facts_file.write_text(json.dumps({"run": "one", part: value}))
    with pytest.raises(UserError, match=f"facts.json isn't as slimtune wrote it: {part} is "):
        run.facts()


def test_facts_of_older_runs_may_lack_parts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.facts() == {}
    run.facts_file.write_text(json.dumps({"run": "one", "verdict": None}))
    assert run.facts() == {"run": "one", "verdict": None}
