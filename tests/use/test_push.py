from __future__ import annotations

import json
import shutil
import socket
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

from slimtune.adapter.passport import read_passport
from slimtune.base.embedded import EMBEDDED
from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.run.folder import RunFolder
from slimtune.use.load import find
from slimtune.use.push import push


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(adapter, folder / "adapter")
    made = RunFolder(folder)
    made.write_config(Config(model=EMBEDDED, data=("/home/someone/rows.jsonl",)))
    for step in range(1, 6):
        made.append_metrics({"step": step, "steps": 5, "loss": 2.0 / step})
    what = [
        {"what": "config learning_rate", "before": "0.5", "after": "0.25"},
        {"what": "data /home/someone/rows.jsonl", "before": "old", "after": "new"},
    ]
    made.append_metrics({"event": "resumed", "step": 5, "changes": what})
    change = {"value": -1.5, "low": -1.75, "high": -1.25}
    verdict = {"outcome": "better", "documents": 8, "start": {"value": 3.0}, "end": {"value": 1.5}, "change": change}
    made.write_json(made.facts_file, {"data": {"rows": 1234, "supervised_tokens": 56789}, "verdict": verdict})
    made.write_json(folder / "compare.json", {"numbers": {"score": 0.95, "base_score": 0.05}})
    (folder / "adapter" / "secret.txt").write_text("not part of an adapter")
    return folder


def test_a_folder_gets_what_the_hub_would(run: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert push(find(str(run)), str(out)) == str(out)
    assert not (out / "secret.txt").exists()
    assert (
        load_file(out / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    )
    assert read_passport(out) == read_passport(adapter)
    _, front, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert about["license"] == "apache-2.0"
    assert about["library_name"] == "peft"
    assert "Better than before the training on 8 held-out documents: loss 3 → 1.5, −1.5 [−1.75, −1.25]." in text
    for part in ("1,234", "56,789", "| score | 0.95 |", "PeftModel.from_pretrained", "![loss by optimizer step]",
                 "| learning_rate until step 5 | `0.5` |", "| data until step 5 | others |"):  # fmt: skip
        assert part in text
    assert "/home/someone" not in text
    assert ET.parse(out / "loss.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="the hub did not take owner/name"):
        push(find(str(run)), "owner/name")


def test_the_passport_holds_no_folders_of_the_machine(run: Path) -> None:
    passport = json.loads((run / "adapter" / "passport.json").read_text())
    assert passport["config"]["data"] == ["rows.jsonl"]


def test_a_bare_model_has_nothing_to_publish(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter to publish"):
        push(find(EMBEDDED), str(tmp_path / "out"))
