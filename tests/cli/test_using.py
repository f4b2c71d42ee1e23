"""The flags that the verbs after training share reach the model that they open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import UserError
from slimtune.use import load

VERBS = {
    "chat": ["--prompt", "?"],
    "compare": [],
    "eval": ["{rows}"],
    "generate": ["{rows}", "-o", "{out}"],
    "serve": ["--port", "0"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_dtype_and_a_quantisation_are_asked_for(
    verb: str,
    tiny_model: Path,
    requests_file: Path,
    tmp_path: Path,
    run_here: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def load_base(source: str, hardware: Any, **options: Any) -> Any:
        asked.update(options)
        raise UserError("seen enough")

    monkeypatch.setattr(load, "load_base", load_base)
    words = [word.format(rows=requests_file, out=tmp_path / "out.jsonl") for word in VERBS[verb]]
    done = run_here(verb, str(tiny_model), *words, "--compute-dtype", "fp16", "--quantization", "none")
    assert (done.returncode, "seen enough" in done.stderr) == (2, True)
    assert (asked["compute_dtype"], asked["quantization"]) == ("fp16", "none")


def test_where_nothing_can_be_written_is_told_before_the_model_is_opened(
    run_here: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "asks.jsonl").write_text('"Why?"\n')
    for verb, *more in (("compare",), ("generate", str(tmp_path / "asks.jsonl"))):
        done = run_here(verb, "smollm2-135m", *more, "-o", str(tmp_path / "file" / "out"))
        assert done.returncode == 2
        assert "nothing can be written into" in done.stderr
