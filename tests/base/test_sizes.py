"""A config that names more than its files hold is refused before a module is made."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerBase

from slimtune.base.classes import skeleton
from slimtune.base.load import load_base
from slimtune.base.sizes import check_sizes
from slimtune.errors import UserError
from slimtune.hardware import detect
from tests.training.tiny import saved


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**7), ("vocab_size", 10**12), ("intermediate_size", 2**40)],
)
def test_what_the_files_do_not_hold_is_not_made(
    field: str, value: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", "qwen3_moe", tokenizer)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    for use in (lambda: load_base(str(folder), detect(), compute_dtype="fp32"), lambda: skeleton(folder)):
        with pytest.raises(UserError, match=rf"names \w+ = {value:,}, and its files hold nothing so large"):
            use()


def grown(file: Path, count: int) -> None:
    """Give a file of weights one more, of ``count`` bytes that take no room on the disk."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    begin = len(content) - end
    header["model.layers.3.extra.weight"] = {"dtype": "U8", "shape": [count], "data_offsets": [begin, begin + count]}
    told = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(told)) + told + content[end:])
        stream.truncate(8 + len(told) + begin + count)


def test_a_file_larger_than_memory_is_read_for_its_sizes_and_refused_for_its_weights(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder, side = saved(tmp_path / "model", "llama", tokenizer), 2**42
    grown(folder / "model.safetensors", side)
    check_sizes(folder, LlamaConfig(vocab_size=side))
    with pytest.raises(UserError, match="its files hold nothing so large"):
        check_sizes(folder, LlamaConfig(num_hidden_layers=10**7))
    with pytest.raises(UserError, match="Cannot allocate memory") as refused:
        load_base(str(folder), detect(), compute_dtype="fp32")
    assert "smaller files" in refused.value.way_out
