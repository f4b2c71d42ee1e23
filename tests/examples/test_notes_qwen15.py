"""The study note's script runs as it stands, with the model swapped for the embedded one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "examples" / "notes_qwen15.py"


def test_the_notes_script_trains_and_saves_the_adapter_alone(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    data = SCRIPT.with_name("requests.jsonl")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(model_folder), str(data), str(output), "2"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    tensors = load_file(output / "adapter_model.safetensors")
    # 30 layers, four projections, A and B.
    assert len(tensors) == 30 * 4 * 2
    assert not (output / "model.safetensors").exists()
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)


def test_the_script_has_the_notes_four_parts_in_order() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    marks = ["BitsAndBytesConfig(\n", "LoraConfig(\n", "SFTTrainer(\n", "trainer.train()", "trainer.save_model("]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "get_peft_model(" not in text.split('"""', 2)[2].replace("no get_peft_model", "")
