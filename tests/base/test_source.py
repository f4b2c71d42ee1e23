"""What a person can get wrong about a model's name, said in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.base.named import model_source
from slimtune.errors import UserError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "does not exist"),
        (lambda folder: _write(folder / "model.bin", "x"), "is a file"),
        (lambda folder: folder, "has no config.json"),
        (lambda folder: _write(folder / "adapter_config.json", '{"base_model_name_or_path": "a/b"}').parent, "(a/b)"),
        (lambda folder: _write(folder / "adapter" / "adapter_config.json", "{}").parents[1], "is a run of slimtune"),
    ],
)
def test_a_path_that_is_no_base_is_named(tmp_path: Path, make: object, message: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        model_source(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.way_out


def test_an_unknown_name_is_refused_without_the_network() -> None:
    with pytest.raises(UserError, match="unknown model 'smollm'"):
        model_source("smollm")


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
