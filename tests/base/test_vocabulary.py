"""Tokens that a person adds, and the rows that a model has for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from slimtune.base.vocabulary import add_tokens, fit_rows, make_room, rows_by_name
from slimtune.errors import UserError
from tests.data.tokenizers import BUILT


def _model(*, rows: int, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def _file(folder: Path, *lines: str) -> Path:
    file = folder / "tokens.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_each_line_is_one_token_wherever_it_stands(tmp_path: Path) -> None:
    tokenizer = BUILT["first"].make()
    known = len(tokenizer)
    made = add_tokens(tokenizer, _file(tmp_path, "<call>", "<|end|>", "[Zürich]", "<call>", ""))
    end = tokenizer.convert_tokens_to_ids("<|end|>")  # was there before, and keeps its id
    assert made.ids == tuple(sorted((end, known, known + 1)))
    assert made.known == known
    for text in ("it<call>it", "<call>", " <call>"):
        assert known in tokenizer(text, add_special_tokens=False).input_ids
    assert "<call>" in tokenizer.decode([known], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((" <call>",), "has space around it"),
        (("▁it",), "is in the vocabulary already"),
        (("",), "names no token"),
        (("x" * 129,), "has 129 characters"),
    ],
)
def test_what_is_no_new_token_is_refused(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_tokens(BUILT["first"].make(), _file(tmp_path, *lines))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt can't be read"):
        add_tokens(BUILT["first"].make(), tmp_path / "absent.txt")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 8])
def test_new_rows_begin_as_the_mean_and_others_stay(tmp_path: Path, tied: bool, padding: int) -> None:
    tokenizer = BUILT["first"].make()
    known = len(tokenizer)
    model = _model(rows=known + padding, tied=tied)
    before = {name: module.weight.detach().clone() for name, module in _tables(model).items()}
    made = add_tokens(tokenizer, _file(tmp_path, "<call>", "<|end|>", "<more>"))
    make_room(model, made)
    named = rows_by_name(model, made)
    assert set(named) == ({"embed_tokens"} if tied else {"embed_tokens", "lm_head"})
    assert all(rows == sorted(made.ids) for rows in named.values())
    rows = max(known + padding, known + 2)
    assert model.config.vocab_size == rows
    for name, module in _tables(model).items():
        assert module.weight.shape[0] == rows
        assert torch.equal(module.weight[:known], before[name][:known])  # a reserved token's row too
        torch.testing.assert_close(module.weight[known], before[name][:known].mean(0))
        torch.testing.assert_close(module.weight[known + 1], before[name][:known].mean(0))
        assert torch.equal(module.weight[known + 2 : known + padding], before[name][known + 2 :])


def test_a_head_in_4_bits_is_refused_with_the_sizes() -> None:
    class Packed(nn.Linear):
        pass

    model = _model(rows=100, tied=False)
    model.lm_head = Packed(16, 100, bias=False)
    with pytest.raises(UserError, match="vocabulary of 100 rows can't become 105") as caught:
        fit_rows(model, 105)
    assert "Packed" in str(caught.value.rule)


def test_another_table_of_tokens_is_refused() -> None:
    model = _model(rows=100, tied=False)
    model.model.embed_tokens_per_layer = nn.Embedding(100, 4)
    with pytest.raises(UserError, match="can't become 105"):
        fit_rows(model, 105)


def _tables(model: nn.Module) -> dict[str, nn.Module]:
    return {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
