"""What upstream doesn't promise is looked for by name, and by a token that every engine says before it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from uvicorn.protocols.http.h11_impl import H11Protocol

from slimtune.errors import UserError
from slimtune.serve import installed, upstream
from slimtune.serve.paged import why_not_paged
from slimtune.use.load import Opened


def test_the_installed_versions_have_all_names() -> None:
    assert upstream.what_transformers_lacks() is None
    installed.check_uvicorn()


def test_a_name_that_is_gone_is_named(models: dict[str, Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ContinuousBatchProcessor, "update_batch")
    assert "has no ContinuousBatchProcessor.update_batch" in str(why_not_paged(models["first"]))
    monkeypatch.delattr(H11Protocol, "on_response_complete")
    with pytest.raises(UserError, match=r"has no H11Protocol\.on_response_complete"):
        installed.check_uvicorn()


def test_only_these_modules_reach_into_upstream() -> None:
    folder = Path(upstream.__file__).parent
    reaching = {file.stem for file in folder.glob("*.py") if "continuous_batching" in file.read_text("utf-8")}
    reaching |= {file.stem for file in folder.glob("*.py") if "uvicorn." in file.read_text("utf-8")}
    assert reaching == {"attention", "choice", "connection", "paged", "server", "upstream", "installed"}
