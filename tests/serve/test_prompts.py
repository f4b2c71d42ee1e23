"""The engine is asked with the ids that the training document of the same conversation begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtune.use.evaluate import documents_of
from slimtune.use.load import Opened
from tests.serve.conftest import Served
from tests.use.test_prompts import CONVERSATIONS


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "control text"])
def test_ids_are_those_of_the_training_render(
    served: Served, models: dict[str, Opened], messages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [*messages, {"role": "assistant", "content": "Well."}]}) + "\n")
    trained, supervised = documents_of(models["first"], (str(rows),))[0]

    seen: list[list[int]] = []
    manager = served.api.engines["first"]._manager
    add = manager.add_request
    monkeypatch.setattr(manager, "add_request", lambda ids, **options: seen.append(ids) or add(ids, **options))
    served.client.chat.completions.create(model="first", messages=messages, max_tokens=1)
    assert seen == [trained[: int(supervised.argmax())].tolist()]
