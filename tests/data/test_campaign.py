"""Generated and mutated files: each is accepted, or refused with its place; no traceback, no row unaccounted for.

``make data-campaign`` runs 10,000 of them; here it is a sample. DATA_CAMPAIGN sets the number for each of the two
parts; the counts go to the file that DATA_CAMPAIGN_RESULT names.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.preflight import Proof, examine
from slimtune.errors import UserError

COUNT = int(os.environ.get("DATA_CAMPAIGN", "60"))
many = settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    derandomize="DATA_CAMPAIGN" not in os.environ,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

nasty = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "\0",
        "\ud800",
        "\ufdd0",
        "\ufeff",
        "</s>",
        "{{ 7*7 }}",
        "",
        " ",
        "\n\n",
        "nan",
    ]
)
words = st.text(max_size=40) | nasty | st.sampled_from(["Hi", "What floats?", "A boat.", "船", "🚢 sails"])
scalars = words | st.none() | st.booleans() | st.integers() | st.floats() | st.lists(words, max_size=2)
mostly_words = st.one_of(words, words, words, scalars)
roles = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "humann"]
)
message = st.fixed_dictionaries(
    {}, optional={"role": roles, "content": mostly_words, "tool_calls": scalars, "reasoning_content": words}
)
turn = st.fixed_dictionaries({}, optional={"from": roles, "value": mostly_words})
pair = st.tuples(words, words).map(
    lambda texts: [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
)
block = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking"])},
    optional={"text": words, "input": scalars, "name": words, "content": scalars, "thinking": scalars},
)
moss = st.dictionaries(st.sampled_from(["Human", "MOSS", "Commands"]), mostly_words)
row = st.one_of(
    st.fixed_dictionaries(
        {"instruction": mostly_words, "output": mostly_words},
        optional={"input": mostly_words, "system": mostly_words, "history": scalars},
    ),
    st.builds(lambda turns: {"messages": turns}, st.lists(message, max_size=5)),
    st.builds(lambda pairs: {"messages": [m for p in pairs for m in p]}, st.lists(pair, max_size=3)),
    st.builds(lambda turns, tools: {"conversations": turns, "tools": tools}, st.lists(turn, max_size=5), scalars),
    st.fixed_dictionaries({"prompt": mostly_words | st.lists(message), "completion": mostly_words | st.lists(message)}),
    st.fixed_dictionaries({"text": mostly_words}, optional={"summary": words, "images": st.lists(words, max_size=2)}),
    st.fixed_dictionaries(
        {"question": mostly_words, "answer": mostly_words},
        optional={"context": mostly_words, "history": scalars, "choices": scalars, "thinking": words},
    ),
    st.fixed_dictionaries(
        {
            "prompt": mostly_words | st.lists(message, max_size=3),
            "chosen": mostly_words | st.lists(message, max_size=3),
        },
        optional={"rejected": mostly_words, "label": scalars, "instruction": words},
    ),
    st.builds(
        lambda name, turns: {name: turns},
        st.sampled_from(["conversation", "dialog", "data", "contents", "chat", "messages"]),
        st.lists(words, max_size=4)
        | st.lists(st.fixed_dictionaries({"human": words, "assistant": mostly_words}), max_size=3)
        | st.lists(st.fixed_dictionaries({"role": roles, "parts": st.lists(scalars, max_size=2)}), max_size=3)
        | st.lists(
            st.fixed_dictionaries(
                {
                    "role": roles,
                    "content": st.lists(st.fixed_dictionaries({"type": st.just("tool_use"), "input": scalars})),
                }
            ),
            max_size=3,
        ),
    ),
    st.builds(
        lambda text, inner: {"prompt": {"text": text, "role": "prompter", "replies": inner}},
        words,
        st.lists(
            st.fixed_dictionaries(
                {"text": mostly_words, "role": st.just("assistant")}, optional={"rank": scalars, "replies": scalars}
            ),
            max_size=2,
        ),
    ),
    st.lists(message, max_size=3),
    st.builds(lambda turn, chat: {"chat": {"turn_1": turn, **chat}}, moss | scalars, st.dictionaries(words, moss)),
    st.dictionaries(words, scalars, max_size=3),
    scalars,
)
rows = st.lists(row, max_size=6)

OUTCOMES: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def result() -> Iterator[None]:
    yield
    if target := os.environ.get("DATA_CAMPAIGN_RESULT"):
        Path(target).write_text(json.dumps(OUTCOMES, indent=2) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("campaign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made / "cache"))
        yield made


def outcome(file: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The file's name if it was accepted with a whole account, else the one error."""
    OUTCOMES["files"] += 1
    config = Config.make(data=str(file), max_length=128, max_dropped=0.9, **options)
    try:
        proof = examine(config, tokenizer)
    except UserError as refused:
        OUTCOMES["refused whole"] += 1
        return str(refused)
    return check_account(proof, config, file.name, tokenizer)


def check_account(proof: Proof, config: Config, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The account is whole and the documents are sound; gives the refusal, or the file's name."""
    facts = proof.facts
    assert facts["rows"] == facts["rows_trained"] + facts["rows_dropped"]
    entries = [json.loads(line) for line in proof.ledger.read_text().splitlines()]
    dropped = [entry for entry in entries if entry["action"] == "dropped"]
    assert sum(entry.get("rows", 1) for entry in dropped) == facts["rows_dropped"]
    for entry in entries:
        assert entry["file"] == name
        assert entry.get("line", entry.get("row", 0)) >= 1
        assert entry["reason"]
    end = tokenizer.eos_token_id
    for at in range(len(proof.train)):
        ids, mask = proof.train[at]
        assert 1 < len(ids) <= 128
        assert mask[1:].any()
        assert ids.min() >= 0
        assert ids.max() < len(tokenizer)
        stops = np.flatnonzero(np.diff(mask.astype(np.int8), append=0) == -1)
        assert (ids[stops] == end).all() or config.overlong in ("split", "keep-end")
    if proof.refusal is not None:
        OUTCOMES["read, training refused"] += 1
    else:
        assert len(proof.train) > 0
        OUTCOMES["accepted"] += 1
    OUTCOMES["rows"] += facts["rows"]
    OUTCOMES["rows trained"] += facts["rows_trained"]
    OUTCOMES["rows dropped"] += facts["rows_dropped"]
    return name if proof.refusal is None else str(proof.refusal)


def written(kind: str, made: list[Any]) -> bytes:
    """Rows as a file of one kind."""
    if kind == "txt":
        return "\n\n".join(json.dumps(r) for r in made).encode("utf-8", "surrogatepass")
    if kind == "wrapped.json":
        return json.dumps({"version": 1, "data": made}, indent=len(made) % 3 or None).encode("utf-8", "surrogatepass")
    if kind == "json":
        return json.dumps(made, indent=len(made) % 3 or None).encode("utf-8", "surrogatepass")
    if kind in ("csv", "tsv"):
        named = [r for r in made if isinstance(r, dict) and r]
        columns = sorted({str(key) for r in named for key in r})
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if kind == "csv" else "\t", escapechar="\\", lineterminator="\n")
        writer.writerow(columns)
        for r in named:
            writer.writerow([str(r.get(column, "")) for column in columns])
        return text.getvalue().encode("utf-8", "surrogatepass")
    lines = "".join(json.dumps(r) + "\n" for r in made).encode("utf-8", "surrogatepass")
    return gzip.compress(lines, 1, mtime=0) if kind == "jsonl.gz" else lines


@many
@example(
    kind="tsv", made=["<|im_end|>", {"a\x85b\u2028c": ""}], overlong="drop", allow=True, prefer=None
)  # in the ledger's reason
@given(st.sampled_from(["json", "wrapped.json", "jsonl", "csv", "tsv", "txt", "jsonl.gz"]), rows,
       st.sampled_from(["drop", "split", "keep-end"]), st.booleans(), st.sampled_from([None, "chosen"]))  # fmt: skip
def test_generated_files(
    folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str, made: list[Any], overlong: str, allow: bool,
    prefer: str | None,
) -> None:  # fmt: skip
    file = folder / f"generated.{kind}"
    file.write_bytes(written(kind, made))
    options = {"overlong": overlong, "allow_control_tokens": allow, "prefer": prefer}
    assert file.name in outcome(file, tokenizer, **options)


def good(kind: str) -> bytes:
    made = [
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"A number: {n} — “{n}”."},
        ]}
        for n in range(6)
    ]  # fmt: skip
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(made), sink)
        return sink.getvalue()
    if kind == "arrow":
        sink = io.BytesIO()
        table = pa.Table.from_pylist(made)
        with pa.ipc.new_stream(sink, table.schema) as file:
            file.write_table(table)
        return sink.getvalue()
    if kind == "csv":
        return written(kind, [{"instruction": f'Say "{n}"', "output": f"It,\nis {n}"} for n in range(6)])
    return written(kind, made)


GOOD = {kind: good(kind) for kind in ("json", "jsonl", "csv", "jsonl.gz", "parquet", "arrow")}
mutation = st.tuples(
    st.sampled_from(["flip", "delete", "insert", "cut", "double"]),
    st.floats(0, 1),
    st.integers(0, 255),
    st.integers(1, 9),
)


def mutated(content: bytes, changes: list[tuple[str, float, int, int]]) -> bytes:
    for how, where, byte, length in changes:
        at = int(where * len(content))
        if how == "flip":
            content = content[:at] + bytes([byte]) + content[at + 1 :]
        elif how == "delete":
            content = content[:at] + content[at + length :]
        elif how == "insert":
            content = content[:at] + bytes([byte]) * length + content[at:]
        elif how == "cut":
            content = content[:at] if byte < 64 else content
        else:
            content = content[:at] + content[at : at + 20 * length] + content[at:]
    return content


@many
@example(kind="arrow", changes=[("double", 0.25, 0, 2), ("delete", 0.25, 190, 9), ("double", 0.88, 0, 2)])  # huge size
@given(st.sampled_from(sorted(GOOD)), st.lists(mutation, min_size=1, max_size=4))
def test_mutated_files(
    folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str, changes: list[tuple[str, float, int, int]]
) -> None:
    file = folder / f"mutated.{kind}"
    file.write_bytes(mutated(GOOD[kind], changes))
    assert file.name in outcome(file, tokenizer)
