"""The embedded model's file, where it isn't as it was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.base import embedded
from slimtune.errors import UserError


@pytest.mark.parametrize("damage", ["cut", "empty", "another format", "a count that lies", "a byte"])
def test_a_damaged_file_is_named_and_nothing_is_left(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _, digest = embedded._gguf_file()
    assert digest is not None
    content = file.read_bytes()
    head = content[:2_000_000]
    written = {"cut": head, "empty": b"", "another format": b"XXXX" + head[4:],
               "a count that lies": head[:8] + (10**12).to_bytes(8, "little") + head[16:],
               "a byte": content[:-1] + bytes([content[-1] ^ 1])}  # fmt: skip
    (tmp_path / "model.gguf").write_bytes(written[damage])
    monkeypatch.setattr(
        embedded, "_gguf_file", lambda: (tmp_path / "model.gguf", "1", digest if damage == "a byte" else None)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"model\.gguf can't be read as the embedded model"):
        embedded.embedded_model_folder()
    assert not list((tmp_path / "cache" / "slimtune" / "models").iterdir())
