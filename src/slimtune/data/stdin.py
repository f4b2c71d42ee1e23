"""Standard input as data: it is read once, so it is kept in a file, and that file is the data from then on."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from slimtune.config import Config
from slimtune.errors import UserError

__all__ = ["is_stdin", "keep_stdin"]

_HEAD = 2**16


def is_stdin(name: str) -> bool:
    """Whether an entry of ``data`` stands for standard input."""
    return _IS_STDIN.match(name) is not None


def keep_stdin(config: Config, folder: Path) -> Config:
    """The config with ``-`` among ``data`` or ``eval`` replaced by a file in ``folder`` that holds standard input.

    What it holds is told by its beginning: JSON, parquet, a compressed file of JSON lines, a table with a header. Raw
    text is taken only where ``format`` says so: a table whose columns aren't known must not be trained on as text.

    Raises:
        UserError: Nothing comes, or ``-`` stands twice, or it isn't told what comes.
    """
    asked = [name for name in (*config.data, *config.eval) if is_stdin(name)]
    if not asked:
        return config
    if len(asked) > 1:
        raise UserError("data - (standard input) stands twice", rule="It can be read once.")
    stream = sys.stdin.buffer
    if sys.stdin.isatty():
        raise UserError("data - is standard input, and nothing is piped into it", way_out="slimtune … - < rows.jsonl")
    head = stream.read(_HEAD)
    if not head.strip():
        raise UserError("data - (standard input) is empty", rule="Data holds at least one row.")
    file = folder.resolve() / f"stdin{_ending(head, config.format)}"
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        out.write(head)
        shutil.copyfileobj(stream, out)
    kept = {
        key: tuple(_IS_STDIN.sub(lambda _: str(file), name, count=1) for name in getattr(config, key))
        for key in ("data", "eval")
    }
    return config.model_copy(update=kept)


_IS_STDIN = re.compile(r"^-(?=$|[#*])")


def _ending(head: bytes, kind: str) -> str:
    for magic, ending in ((b"PAR1", ".parquet"), (b"ARROW1", ".arrow"), (b"\x1f\x8b", ".jsonl.gz"),
                          (b"\x28\xb5\x2f\xfd", ".jsonl.zst")):  # fmt: skip
        if head.startswith(magic):
            return ending
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"{", b"["):
        return ".json"
    first = text.split(b"\n", 1)[0]
    if kind.startswith("text"):
        return ".txt"
    if not (b"," in first or b"\t" in first):
        raise UserError(
            "data - (standard input) is neither JSON nor a table with a header",
            way_out="Raw text is taken with --format text, text-lines or text-whole.",
        )
    return ".tsv" if b"\t" in first else ".csv"
