"""What ends a reply is what the generation config names, where the template leaves a choice."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, LlamaConfig

from slimtune.data.render import ChatRenderer
from slimtune.data.stops import GENERATION_CONFIG, named_stops, save_stops
from tests.data import judge

TWO_MARKS = (Path(__file__).parent / "templates" / "kinds" / "two-marks.jinja").read_text(encoding="utf-8")


def test_the_generation_config_decides_between_two_marks(tmp_path: Path) -> None:
    tokenizer = judge.tokenizer_for(TWO_MARKS)
    said, over = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<|SAID|>", "<|TURN_OVER|>"))
    assert ChatRenderer(tokenizer).end_ids == (over,)
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": said}))
    assert named_stops(tokenizer) == (said,)
    assert ChatRenderer(tokenizer).end_ids == (said,)


def test_what_is_saved_keeps_the_bases_own_and_adds_the_trainings(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    (base / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [7, 3], "temperature": 0.6}))
    save_stops(folder, base, (3, 5))
    assert json.loads((folder / GENERATION_CONFIG).read_text()) == {"eos_token_id": [7, 3, 5], "temperature": 0.6}


def test_where_the_base_has_no_generation_config_its_config_says_what_stops_it(tmp_path: Path) -> None:
    """By Transformers' own reading of both folders."""
    LlamaConfig(bos_token_id=1, eos_token_id=[7, 3], pad_token_id=0).save_pretrained(tmp_path / "base")
    base = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path / "base"))
    (tmp_path / "merged").mkdir()
    save_stops(tmp_path / "merged", tmp_path / "base", (3, 5))
    merged = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert merged.eos_token_id == [*base.eos_token_id, 5]
    assert (merged.bos_token_id, merged.pad_token_id) == (base.bos_token_id, base.pad_token_id) == (1, 0)


def test_calls_may_end_by_a_mark_of_their_own() -> None:
    folder = Path(__file__).parent / "templates" / "kinds"
    for kind, marks in (
        ("channels", ("<|return|>", "<|call|>")),
        ("next-speaker", ("<|user|>", "<|observation|>")),
        ("empty-channel", ("<turn|>", "<|tool_response>")),
        ("other-close", ("<|end|>", "<|called|>")),
        ("plain", ("<|im_end|>",)),
    ):
        tokenizer = judge.tokenizer_for((folder / f"{kind}.jinja").read_text(encoding="utf-8"))
        assert ChatRenderer(tokenizer).end_ids == tuple(tokenizer.convert_tokens_to_ids(list(marks))), kind
