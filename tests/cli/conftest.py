from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from slimtune.cli import main


@dataclass(frozen=True)
class Done:
    """What a call of the command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process, which has imported everything already: ``run_here("data", file)``."""

    def call(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["slimtune", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return call
