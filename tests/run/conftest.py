"""One real run on the tiny model, with held-out data, for all that reads a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.config import Config
from slimtune.recipes import finetune
from slimtune.run.folder import RunFolder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, requests_file: Path) -> RunFolder:
    config = Config.make(
        model=str(tiny_model),
        data=str(requests_file),
        output=tmp_path_factory.mktemp("runs") / "finished",
        eval_share=0.1,
        max_steps=12,
        eval_steps=4,
        max_length=128,
        gradient_accumulation=1,
        learning_rate=1e-2,
    )
    return finetune(config)
