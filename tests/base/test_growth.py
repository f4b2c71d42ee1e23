"""A tokenizer that makes a text many times as long is refused before the library reads it; real ones are taken."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from slimtune.base.growth import check_growth
from slimtune.base.tokenizer import load_tokenizer
from slimtune.errors import UserError
from tests.data.tokenizers import BUILT

FILE = Path("tokenizer.json")


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def table(*texts: str) -> str:
    """SentencePiece's: an empty trie, and what texts are replaced by."""
    return base64.b64encode(struct.pack("<I", 0) + b"\0".join(text.encode() for text in texts)).decode()


DOUBLING = {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}
GROWING: dict[str, dict[str, Any]] = {
    "doubling": {"normalizer": DOUBLING},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLING, replace("a", "b")]}},
    "by a pattern": {"normalizer": replace("a|b", "x" * 1000, "Regex")},
    "in the decoder": {"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 40}},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table("x" * 1000, "y")}},
    "in front": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "around": {"post_processor": {"type": "Sequence", "processors": [
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
         "special_tokens": {"x": {"id": "x", "ids": [1] * 10**5, "tokens": ["x"] * 10**5}}}]}},
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_a_text_that_would_grow_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"times as long|pieces around") as refused:
        check_growth(FILE, GROWING[name])
    assert next(iter(GROWING[name])) in refused.value.what


@pytest.mark.parametrize(
    "spec",
    [[], "x", {"normalizer": []}, {"normalizer": {"normalizers": 3, "content": 1}},
     {"normalizer": {"precompiled_charsmap": "!"}}, {"post_processor": {"single": 1}}],
)  # fmt: skip
def test_what_is_no_tokenizer_is_the_librarys_to_refuse(spec: Any) -> None:
    check_growth(FILE, spec)


@pytest.mark.parametrize("kind", BUILT)
def test_tokenizers_of_families_are_taken(kind: str) -> None:
    check_growth(FILE, json.loads(BUILT[kind].make().backend_tokenizer.to_str()))


def test_steps_that_tokenizers_have_are_taken() -> None:
    """XLNet's and Albert's, and what code models write white space as."""
    steps = [normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
             normalizers.Replace("\t", "<|tab|>"), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # fmt: skip
    spec = json.loads(normalizers.Sequence(steps).__getstate__())
    spec["normalizers"].append({"type": "Precompiled", "precompiled_charsmap": table("صلى الله عليه وسلم", "x")})
    check_growth(FILE, {"normalizer": spec})


def test_it_is_refused_before_the_library_reads_it(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder / name, tmp_path / name)
    spec = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["normalizer"] = DOUBLING  # the library would take it through all added tokens while it loads
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match="times as long"):
        load_tokenizer(str(tmp_path))
