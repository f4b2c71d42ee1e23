"""Templates that don't say that it is the assistant's turn are given the reply's header, and no others are changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.data.conversation import normalise
from slimtune.data.header import added_header, completed
from slimtune.data.render import ChatRenderer, prompt_ids
from tests.data import judge

FOLDER = Path(__file__).parent / "templates"
ASK = {"role": "user", "content": "What floats?"}
REPLY = {"role": "assistant", "content": "A boat."}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LACKING = {
    "chatml": (CHATML, "<|im_start|>assistant\n"),
    "ends with a newline": (CHATML + "\n", "<|im_start|>assistant\n"),
    "opens a turn and doesn't say whose": (
        CHATML + "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        "assistant\n",
    ),
    "turns end where the next begins": (
        "{% for m in messages %}{{ '</s>' if not loop.first }}{{ '[' ~ m.role ~ '] ' ~ m.content }}{% endfor %}</s>",
        "[assistant]",
    ),
    "a quote in the header": (
        "{% for m in messages %}{{ '<|' ~ m.role ~ ' as=\"text\"|>' ~ m.content ~ '</s>' }}{% endfor %}",
        '<|assistant as="text"|>',
    ),
    "an empty thought in every reply": (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}{% if m.role == 'assistant' %}"
        "{{ '<think>' ~ m.reasoning_content | default('') ~ '</think>' }}{% endif %}{{ m.content ~ '</s>' }}"
        "{% endfor %}",
        "<|assistant|>",
    ),
    "turns as parts": (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}{% for p in m.content %}{{ p['text'] }}{% endfor %}</s>"
        "{% endfor %}",
        "<|assistant|>",
    ),
}


@pytest.mark.parametrize("kind", LACKING)
def test_the_header_is_what_stands_between_the_turns_and_the_reply(kind: str) -> None:
    source, header = LACKING[kind]
    made = completed(source, SPECIAL)
    assert added_header(made) == header
    assert completed(made, SPECIAL) == made
    before, after = judge.tokenizer_for(source), judge.tokenizer_for(made)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (ASK, REPLY)]
    turns = parts if kind == "turns as parts" else [ASK, REPLY]
    for said in (turns[:1], turns):
        bare = before.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert after.apply_chat_template(said, tokenize=False, add_generation_prompt=True) == f"{bare}{header}"
        plain = before.apply_chat_template(said, tokenize=False)
        assert after.apply_chat_template(said, tokenize=False) == plain
    asked = after.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert plain.startswith(asked)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.jinja")), ids=lambda path: path.stem)
def test_what_lacks_nothing_stays_as_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if path.stem not in ("no-prompt", "no-prompt-thinks", "half-prompt", "words"):
        assert completed(source, SPECIAL) == source


def test_only_the_reply_is_learnt_and_the_model_is_asked_with_its_header() -> None:
    tokenizer = judge.as_loaded(judge.tokenizer_for(CHATML))
    renderer = ChatRenderer(tokenizer)
    (draft,) = renderer.drafts(normalise({"messages": [ASK, REPLY, ASK, REPLY]}))
    assert "".join(piece.text for piece in draft.pieces if piece.supervised) == "A boat.<|im_end|>" * 2
    asked = tokenizer.decode(prompt_ids(tokenizer, [ASK, REPLY, ASK]))
    assert asked.endswith("What floats?<|im_end|>\n<|im_start|>assistant\n")


def test_a_lost_indent_is_noted() -> None:
    row = {"messages": [ASK, {**REPLY, "content": "\n    return 1\n"}]}
    for name, notes in (("trimmed", ["indent-lost"]), ("plain", [])):
        tokenizer = judge.tokenizer_for((FOLDER / "kinds" / f"{name}.jinja").read_text(encoding="utf-8"))
        (draft,) = ChatRenderer(tokenizer).drafts(normalise(row))
        assert draft.notes == notes
