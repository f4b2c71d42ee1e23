"""The proof as a whole: what is trained on, what is set apart, what is cached, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data import preflight
from slimtune.data.held_out import share_of
from slimtune.data.preflight import Proof, examine, prove
from slimtune.data.view import hints
from slimtune.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int, start: int = 0) -> list[Any]:
    return [{"instruction": f"Say {n}", "output": f"It is {n}."} for n in range(start, start + count)]


def learnt(proof: Proof, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(ids[mask]) for ids, mask in (proof.train[at] for at in range(len(proof.train)))]


ALTERNATING = """{% for m in messages %}{% if (m.role == "user") != (loop.index0 % 2 == 0) %}
{{ raise_exception("roles must alternate") }}{% endif %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one " * 20},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two " * 20},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "three " * 20},
        {"role": "assistant", "content": "third"},
    ]
}


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", "first<|im_end|>second<|im_end|>third<|im_end|>"),
        ("last", "third<|im_end|>"),
        ("completion", "third<|im_end|>"),
    ],
)
def test_train_on(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, train_on: str, expected: str) -> None:
    file = write(tmp_path / "a.jsonl", [CHAT])
    assert learnt(prove(Config.make(data=file, train_on=train_on), tokenizer), tokenizer) == [expected]


def test_train_on_all_and_completions_and_raw_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", [CHAT])
    _, mask = prove(Config.make(data=file, train_on="all"), tokenizer).train[0]
    assert mask.all()
    messages = CHAT["messages"]
    file = write(tmp_path / "b.jsonl", [{"prompt": messages[:4], "completion": messages[4:]}])
    assert learnt(prove(Config.make(data=file), tokenizer), tokenizer) == ["second<|im_end|>third<|im_end|>"]
    file = write(tmp_path / "c.jsonl", [{"text": "Plain <|im_end|> text."}])
    proof = prove(Config.make(data=file), tokenizer)
    assert learnt(proof, tokenizer) == ["Plain <|im_end|> text.<|im_end|>"]
    assert (proof.train[0][0] == tokenizer.eos_token_id).sum() == 1


def overlong(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, how: str, limit: int = 64) -> Proof:
    file = write(tmp_path / "a.jsonl", [CHAT])
    return examine(Config.make(data=file, overlong=how, max_length=limit, max_dropped=0.9), tokenizer)


def test_overlong_drop_and_error_name_the_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    proof = overlong(tmp_path, tokenizer, "drop")
    tokens = overlong(tmp_path, tokenizer, "drop", 2048).train.tokens
    assert proof.facts["examples"] == {"too-long": f"a.jsonl:1: {tokens} tokens, over max_length 64"}
    with pytest.raises(
        UserError, match=f"a.jsonl:1: {tokens} tokens, over max_length 64(.|\n)*--max-length to {tokens}"
    ):
        overlong(tmp_path, tokenizer, "error")


def test_overlong_split_that_doesnt_help_isnt_advised(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for how, advised in (("split", False), ("drop", True)):
        refusal = overlong(tmp_path, tokenizer, how, 8).refusal
        assert refusal is not None
        assert refusal.way_out is not None
        assert "Raise --max-length to" in refusal.way_out
        assert ("--overlong" in refusal.way_out) == advised


def test_overlong_split_keeps_every_reply_and_the_system_turn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    proof = overlong(tmp_path, tokenizer, "split")
    assert learnt(proof, tokenizer) == ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]
    assert all("Be kind." in tokenizer.decode(proof.train[at][0]) for at in range(3))
    assert proof.train.lengths.max() <= 64
    assert proof.facts["repaired"] == {"split": 1}
    assert (proof.facts["rows"], proof.facts["rows_trained"], proof.facts["documents"]) == (1, 1, 3)


def test_overlong_keep_end_drops_the_oldest_then_cuts_the_question(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    proof = overlong(tmp_path, tokenizer, "keep-end")
    assert learnt(proof, tokenizer) == ["third<|im_end|>"]
    assert proof.facts["repaired"] == {"oldest-dropped": 1}
    proof = overlong(tmp_path, tokenizer, "keep-end", 32)
    assert learnt(proof, tokenizer) == ["third<|im_end|>"]
    text = tokenizer.decode(proof.train[0][0])
    assert "Be kind." in text
    assert 1 <= text.count("three") < 20
    assert proof.facts["repaired"] == {"cut-left": 1}


@pytest.mark.parametrize("how", ["split", "keep-end"])
@pytest.mark.parametrize("train_on", ["assistant", "last", "completion"])
def test_what_is_too_long_learns_no_reply_that_it_would_not_learn_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, how: str, train_on: str
) -> None:
    messages = CHAT["messages"]
    completion = write(tmp_path / "a.jsonl", [{"prompt": messages[:-1], "completion": messages[-1:]}])
    file = completion if train_on == "assistant" else write(tmp_path / "b.jsonl", [CHAT])
    for limit in (64, 96, 128):
        proof = prove(Config.make(data=file, train_on=train_on, overlong=how, max_length=limit), tokenizer)
        assert learnt(proof, tokenizer) == ["third<|im_end|>"]


def test_replies_that_are_joined_are_those_of_the_completion(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = ALTERNATING
    messages = CHAT["messages"][1:]
    file = write(tmp_path / "a.jsonl", [{"prompt": messages[:3], "completion": [messages[3], messages[5]]}])
    assert learnt(prove(Config.make(data=file), tokenizer), tokenizer) == ["second\n\nthird<|im_end|>"]
    file = write(tmp_path / "b.jsonl", [{"messages": [*messages[:3], {**messages[3], "weight": 0}, messages[5]]}])
    said = examine(Config.make(data=file), tokenizer).facts["examples"]
    assert said == {"weight": "b.jsonl:1: replies in a row of which one is learnt and one isn't"}


@pytest.mark.parametrize("how", ["split", "keep-end"])
def test_no_reply_is_ever_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, how: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "Count.", "output": "number " * 200}])
    proof = examine(Config.make(data=file, overlong=how, max_length=64), tokenizer)
    assert proof.facts["rows_dropped"] == 1
    assert f"{how} can't make it fit without cutting a reply" in proof.facts["examples"]["too-long"]


def test_raw_text_is_split_where_the_limit_is(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "word " * 100}])
    proof = prove(Config.make(data=file, overlong="split", max_length=32), tokenizer)
    assert "".join(learnt(proof, tokenizer)) == "word " * 100 + "<|im_end|>"


def test_weights_and_shares(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = write(tmp_path / "one.jsonl", numbered(20)), write(tmp_path / "two.jsonl", numbered(10, 20))
    proof = prove(Config.make(data=(one, f"{two}*2.5"), eval_share=0.0), tokenizer)
    counts = np.bincount(proof.train.chosen)
    assert counts[:20].tolist() == [1] * 20
    assert sorted(counts[20:].tolist()) == [2] * 5 + [3] * 5
    assert {str(proof.train.place(at)).split(":")[0] for at in range(len(proof.train))} == {"one.jsonl", "two.jsonl"}


def test_a_share_split_off_keeps_duplicates_on_one_side(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", numbered(50) + numbered(50))
    proof = prove(Config.make(data=file, eval_share=0.2), tokenizer)
    assert proof.eval is not None
    assert len(proof.train) + len(proof.eval) == 100
    assert len(proof.eval) == 20
    assert proof.facts["duplicates"] == 50
    training = {tuple(proof.train[at][0].tolist()) for at in range(80)}
    assert not training & {tuple(proof.eval[at][0].tolist()) for at in range(20)}
    again = prove(Config.make(data=file, eval_share=0.2), tokenizer)
    assert again.eval is not None
    assert again.eval.chosen.tolist() == proof.eval.chosen.tolist()


@pytest.mark.parametrize(
    ("rows", "held"), [(12, 0), (19, 0), (20, 8), (160, 8), (161, 8), (170, 8), (171, 9), (4000, 200), (5000, 200)]
)
def test_so_many_rows_are_held_out_by_themselves(rows: int, held: int) -> None:
    share = share_of(rows)
    assert round(share * rows) == held
    assert share == float(f"{share:.6g}")


def test_rows_are_held_out_unless_asked_otherwise(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", numbered(40))
    proof = prove(Config.make(data=file), tokenizer)
    assert proof.eval is not None
    assert (len(proof.train), len(proof.eval), proof.share, proof.different_rows) == (32, 8, 0.2, 40)
    assert proof.facts["held_out"]["documents"] == 8
    # What the run's config records gives the same rows.
    again = prove(Config.make(data=file, eval_share=proof.share), tokenizer)
    assert again.facts["held_out"] == proof.facts["held_out"]
    other = prove(Config.make(data=file, seed=1), tokenizer)
    assert other.facts["held_out"]["fingerprint"] != proof.facts["held_out"]["fingerprint"]
    none = prove(Config.make(data=file, eval_share=0.0), tokenizer)
    assert (none.eval, len(none.train), "held_out" in none.facts) == (None, 40, False)


def test_rows_of_one_line_are_rows_of_their_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(numbered(40)), encoding="utf-8")
    proof = prove(Config.make(data=file), tokenizer)
    assert proof.eval is not None
    assert (len(proof.train), len(proof.eval), proof.different_rows) == (32, 8, 40)


def test_of_few_rows_none_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # Forty rows, but nineteen different ones.
    file = write(tmp_path / "a.jsonl", numbered(19) + numbered(19) + numbered(2))
    proof = prove(Config.make(data=file), tokenizer)
    assert (proof.eval, len(proof.train), proof.different_rows) == (None, 40, 19)
    with pytest.raises(UserError, match=r"of 19 different rows none is held out(.|\n)*--eval DATA"):
        prove(Config.make(data=file, early_stopping=2), tokenizer)


def test_held_out_data_is_proven_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = write(tmp_path / "one.jsonl", numbered(20)), write(tmp_path / "two.jsonl", numbered(5, 20))
    proof = prove(Config.make(data=one, eval=two), tokenizer)
    assert proof.eval is not None
    assert len(proof.eval) == 5
    write(tmp_path / "two.jsonl", [{"instruction": "a", "output": ""}])
    with pytest.raises(UserError, match=r"1 of 1 evaluation rows can't(.|\n)*two.jsonl:1, field 'output'"):
        prove(Config.make(data=one, eval=two), tokenizer)


def test_held_out_rows_that_are_trained_on_too_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Else what was learnt by heart would be told as what the run does to rows that it hasn't seen."""
    one, two = write(tmp_path / "one.jsonl", numbered(20)), write(tmp_path / "two.jsonl", numbered(5, 17))
    config = Config.make(data=one, eval=two)
    proof = prove(config, tokenizer)
    assert proof.facts["eval"]["trained_on"] == 3
    assert any(
        "3 held-out documents are left out: they are trained on too" in line for line in hints(proof, config, ())
    )
    assert proof.eval is not None
    assert [proof.eval.place(at).number for at in range(len(proof.eval))] == [4, 5]
    assert prove(Config.make(data=one, eval=two, train_on="all"), tokenizer).facts["eval"]["trained_on"] == 3
    apart = write(tmp_path / "three.jsonl", numbered(5, 20))
    assert prove(Config.make(data=one, eval=apart), tokenizer).facts["eval"]["trained_on"] == 0
    with pytest.raises(UserError, match="all 20 held-out documents are trained on too"):
        prove(Config.make(data=one, eval=one), tokenizer)
    with pytest.raises(UserError, match="no held-out document is left"):
        prove(Config.make(data=one, eval=f"{apart}*0.01"), tokenizer)


def test_a_weight_that_leaves_no_row_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", numbered(20))
    with pytest.raises(UserError, match="no document is left to train on"):
        prove(Config.make(data=f"{file}*0.01"), tokenizer)


def test_the_cache_is_taken_only_for_the_same_content(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", numbered(5))
    config = Config.make(data=file)
    assert not examine(config, tokenizer).cached
    first = examine(config, tokenizer)
    assert first.cached
    for changed in ({"max_length": 512}, {"train_on": "all"}, {"allow_control_tokens": True}, {"overlong": "split"}):
        assert not examine(Config.make(data=file, **changed), tokenizer).cached
    assert examine(Config.make(data=file, learning_rate=1.0, max_dropped=0.5), tokenizer).cached
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("named SmolLM", "named Tug")
        assert not examine(config, tokenizer).cached
    finally:
        tokenizer.chat_template = template
    monkeypatch.setattr(preflight, "code_sum", lambda *_: "other code")
    assert not examine(config, tokenizer).cached
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert examine(config, tokenizer).cached
    text = Path(file).read_text()
    Path(file).write_text(text.replace("It is 4.", "It is 5."))
    second = examine(config, tokenizer)
    assert not second.cached
    assert second.key != first.key


def test_a_proof_that_was_interrupted_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", numbered(5))

    def interrupt(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(Config.make(data=file), tokenizer, on_progress=interrupt)
    assert list(preflight.cache_folder().iterdir()) == []


def test_a_formatting_func_gives_text_or_messages(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", [{"q": "Hi", "a": "Hello."}])
    config = Config.make(data=file)
    chat = prove(
        config,
        tokenizer,
        formatting_func=lambda row: [
            {"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}
        ],
    )  # fmt: skip
    assert learnt(chat, tokenizer) == ["Hello.<|im_end|>"]
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>"
    text = prove(config, tokenizer, formatting_func=lambda row: rendered)
    ids, mask = text.train[0]
    assert ids.tolist() == tokenizer(rendered, add_special_tokens=False).input_ids
    assert mask.all()
    with pytest.raises(UserError, match=r"1 of 1 rows can't be trained on(.|\n)*a.jsonl:1"):
        prove(config, tokenizer, formatting_func=lambda row: 5)


def test_files_of_one_name_are_told_apart(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    bad = {"instruction": "a", "output": ""}
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "rows.jsonl", [*numbered(9, 9 * number), bad])
    one, two = (tmp_path / folder / "rows.jsonl" for folder in ("one", "two"))
    other = write(tmp_path / "other.jsonl", [*numbered(9, 18), bad])
    proof = prove(Config.make(data=tuple(map(str, (one, two, other, one))), max_dropped=0.2), tokenizer)
    refused = [(entry["file"], entry["line"]) for entry in map(json.loads, proof.ledger.read_text().splitlines())]
    assert refused == [(str(one), 10), (str(two), 10), ("other.jsonl", 10), (str(one), 10)]


def test_the_ledger_goes_into_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*numbered(100), {"messages": [{"role": "assistant", "content": "a"}, *CHAT["messages"][1:]]}]
    proof = prove(Config.make(data=write(tmp_path / "a.jsonl", rows)), tokenizer)
    proof.save_ledger(tmp_path / "ledger.jsonl")
    (entry,) = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert entry == {
        "file": "a.jsonl", "line": 101, "action": "repaired", "rule": "leading-reply",
        "reason": "replies before the first user turn were left out",
    }  # fmt: skip


def test_what_the_cache_refuses_is_told_with_its_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="the cache can't be written") as refused:
        examine(Config.make(data=write(tmp_path / "a.jsonl", numbered(3))), tokenizer)
    assert "XDG_CACHE_HOME" in refused.value.way_out


def test_more_turns_than_tokens_are_dropped_before_they_are_rendered(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each reply is rendered with all that stands before it: thousands of turns would take hours."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": "x"} for at in range(20_000)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    proof = examine(Config.make(data=str(tmp_path / "a.jsonl")), tokenizer)
    assert proof.facts["dropped"] == {"too-long": 1}
    assert "20,000 turns" in proof.facts["examples"]["too-long"]
