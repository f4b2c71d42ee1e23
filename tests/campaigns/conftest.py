"""The campaigns' model, data, and reference runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaigns import campaign

Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, data file)."""
    folder = tmp_path_factory.mktemp("parts")
    return campaign.make_model(folder / "model"), campaign.make_rows(folder / "rows.jsonl")


@pytest.fixture(scope="session")
def train(parts: tuple[Path, Path]) -> Command:
    """The arguments of a ``train`` into a folder."""

    def command(run: Path, *more: str) -> list[str]:
        model, rows = parts
        return ["train", str(model), str(rows), "-o", str(run), *campaign.OPTIONS, *more]

    return command


@pytest.fixture(scope="session")
def reference(train: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An uninterrupted run on an engine (fused, plain)."""
    made: dict[str, Path] = {}

    def of(engine: str) -> Path:
        if engine not in made:
            run = tmp_path_factory.mktemp("reference") / engine
            process = campaign.Process(train(run, "--engine", engine), run.with_suffix(".log"))
            assert process.wait() == 0, process.output()
            made[engine] = run
        return made[engine]

    return of
