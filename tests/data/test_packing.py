"""Packs: full, in a seeded order, and the same training as their documents one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from slimtune.batch import IGNORED, LENGTHS
from slimtune.config import Config
from slimtune.data.documents import Documents, Together
from slimtune.data.packing import (
    GroupedBatches,
    PackedBatches,
    assign_packs,
    assign_rows,
    held_out_batches,
    micro_batches,
)
from slimtune.data.preflight import Proof, prove


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Proof:
    folder = tmp_path_factory.mktemp("packs")
    random = np.random.default_rng(7)
    rows = [
        {"instruction": f"Count to {n}.", "output": " ".join(map(str, range(int(random.integers(2, 60)))))}
        for n in range(200)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return prove(Config.make(data=str(folder / "rows.jsonl"), max_length=256, eval_share=0.0), tokenizer)


def packs(proof: Proof, **changed: Any) -> PackedBatches:
    values = {"tokens": 512, "seed": 3, "longest": 256, **changed}
    return PackedBatches(proof.train, **values)


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_document_gets_one_pack_that_holds_it(lengths: list[int]) -> None:
    packs, count = assign_packs(np.array(lengths, np.int32), 64)
    used = np.bincount(packs, weights=lengths, minlength=count)
    assert len(packs) == len(lengths)
    assert (used <= 64).all()
    assert (used > 0).all()
    # Johnson 1973: best-fit-decreasing needs at most 11/9 of the optimum and 4 bins more
    assert count <= 11 / 9 * -(-sum(lengths) // 64) + 4 or max(lengths) > 32


def chat_lengths(count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """16 to 2048 tokens, mean about 370."""
    random, sigma = np.random.default_rng(0), 0.9
    return np.clip(random.lognormal(np.log(370) - sigma**2 / 2, sigma, count), 16, 2048).astype(np.int32)


@pytest.mark.parametrize(("capacity", "full"), [(2**11, 0.998), (2**12, 0.999), (2**14, 0.999)])
def test_packs_of_chat_lengths_are_full(capacity: int, full: float) -> None:
    lengths = chat_lengths(20_000)
    _, count = assign_packs(lengths, capacity)
    assert lengths.sum() / (count * capacity) >= full


def test_large_packs_are_alike() -> None:
    lengths = chat_lengths(20_000)
    packs, count = assign_packs(lengths, 2**14)
    documents = np.bincount(packs)
    longest, shortest = np.zeros(count, np.int32), np.full(count, 2048, np.int32)
    np.maximum.at(longest, packs, lengths)
    np.minimum.at(shortest, packs, lengths)
    # best fit alone: 8 to 130 documents, some packs with none over 130 tokens
    assert documents.min() > 0.8 * documents.mean()
    assert documents.max() < 1.4 * documents.mean()
    assert longest.min() > 1000
    assert shortest.max() < 200


def test_every_document_comes_once_in_every_epoch_and_shapes_never_change(proof: Proof) -> None:
    batches = packs(proof)
    for epoch in range(2):
        seen = [m for at in range(batches.per_epoch) for m in batches.members(epoch * batches.per_epoch + at)]
        assert sorted(seen) == list(range(len(proof.train)))
    made = [batches.batch(at) for at in range(batches.per_epoch)]
    shapes = {tuple(v.shape) for batch in made for key, v in batch.items() if key != LENGTHS}
    assert all(sum(batch[LENGTHS]) == 512 for batch in made)
    assert shapes == {(1, 512)}
    assert batches.fill > 0.9


def test_the_order_is_a_pure_function_of_seed_and_epoch(proof: Proof) -> None:
    first, again = packs(proof), packs(proof)
    n = first.per_epoch
    positions = [2 * n + 3, 0, n + 1, 2 * n + 3]  # any order of asking, as after a resume
    asked = [first.batch(p)["input_ids"].tolist() for p in positions]
    assert asked == [again.batch(p)["input_ids"].tolist() for p in reversed(positions)][::-1]
    assert asked[0] == asked[3]
    assert [first.members(p).tolist() for p in range(n)] != [first.members(n + p).tolist() for p in range(n)]
    other = packs(proof, seed=4)
    assert [first.members(p).tolist() for p in range(n)] != [other.members(p).tolist() for p in range(n)]


def test_labels_positions_and_padding_of_a_pack(proof: Proof) -> None:
    batches = packs(proof)
    for position in range(batches.per_epoch):
        made = batches.batch(position)
        lengths = made.pop(LENGTHS)
        batch = {key: value[0] for key, value in made.items()}
        assert lengths[: len(batches.members(position))] == tuple(
            len(proof.train[int(member)][0]) for member in batches.members(position)
        )
        at = 0
        for member in batches.members(position):
            ids, supervised = proof.train[int(member)]
            end = at + len(ids)
            assert batch["input_ids"][at:end].tolist() == ids.tolist()
            assert batch["position_ids"][at:end].tolist() == list(range(len(ids)))
            assert batch["labels"][at] == IGNORED
            expected = np.where(supervised, ids, IGNORED)[1:].tolist()
            assert batch["labels"][at + 1 : end].tolist() == expected
            at = end
        assert (batch["labels"][at:] == IGNORED).all()
        assert (batch["input_ids"][at:] == batch["input_ids"][0]).all()
        assert at == 512 or batch["position_ids"][at] == 0
        assert int(batch["position_ids"].max()) < 256
        assert len(batches.rows(position)) == len(batches.members(position))
        assert str(batches.rows(position)[0]).startswith("rows.jsonl:")


def test_sizes_are_those_of_the_micro_batches(proof: Proof) -> None:
    """Across an epoch's end; of documents that stand twice too, and of two stores together."""
    twice = Documents(proof.train.store, np.concatenate([proof.train.chosen, proof.train.chosen[:50]]))
    for documents in (proof.train, twice, Together(proof.train, twice, 2, 0.25)):
        data = PackedBatches(documents, tokens=512, seed=3, longest=256)
        first, end = data.per_epoch - 2, data.per_epoch + 2
        lengths, supervised = data.sizes(first, end)
        whole = [data.micro_batch(position) for position in range(first, end)]
        assert lengths == [len(documents[int(at)][0]) for p in range(first, end) for at in data.members(p)]
        assert supervised == sum(batch.supervised for batch in whole)
        assert data.sizes(first, first) == ([], 0)


@pytest.mark.parametrize("kind", [PackedBatches, GroupedBatches])
def test_each_document_has_its_weight_wherever_it_stands(proof: Proof, kind: Any) -> None:
    others = Documents(proof.train.store, proof.train.chosen[:50])
    data = kind(Together(proof.train, others, 2, 0.25), tokens=512, seed=3, **_rest(kind))
    own = 2 * len(proof.train)
    for position in range(data.per_epoch):
        micro, members = data.micro_batch(position), data.members(position)
        assert micro.weights is not None
        padding = len(micro.lengths) - len(members)
        assert micro.weights == (*(1.0 if at < own else 0.25 for at in members), *[1.0] * padding)
    assert kind(proof.train, tokens=512, seed=3, **_rest(kind)).micro_batch(0).weights is None


def _rest(kind: Any) -> dict[str, int]:
    return {"longest": 256} if kind is PackedBatches else {}


def test_less_than_a_pack_still_trains(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    config = Config.make(data=str(file), micro_batch=2)
    batches = micro_batches(prove(config, tokenizer).train, config)
    assert batches.per_epoch == 1
    assert batches.batch(5)["input_ids"].shape == (1, 64)
    assert (batches.batch(5)["labels"] != IGNORED).sum() == 2  # "b" and the end mark


def test_held_out_documents_make_enough_parts(proof: Proof) -> None:
    few = Documents(proof.train.store, np.arange(8))
    alone = held_out_batches(few, Config.make(micro_batch=4))
    assert (alone.per_epoch, sorted(int(alone.members(at)[0]) for at in range(8))) == (8, list(range(8)))
    for layout in ("packed", "padded"):
        many = held_out_batches(proof.train, Config.make(layout=layout))
        assert 16 <= many.per_epoch <= 64
        assert sorted(member for at in range(many.per_epoch) for member in many.members(at)) == list(range(200))
    # A pack is never larger than training's.
    tight = held_out_batches(proof.train, Config.make(max_length=256))
    assert tight.batch(0)["input_ids"].shape[1] <= 256


def test_without_packing_documents_are_padded_on_the_right(proof: Proof) -> None:
    config = Config.make(data="rows.jsonl", packing=False, micro_batch=3)
    batches = micro_batches(proof.train, config)
    assert batches.per_epoch == 67
    seen = [m for at in range(batches.per_epoch) for m in batches.members(at)]
    assert sorted(seen) == list(range(200))
    batch = batches.batch(0)
    assert set(batch) == {"input_ids", "labels", "attention_mask", LENGTHS}
    for row, member in enumerate(batches.members(0)):
        ids, supervised = proof.train[int(member)]
        n = len(ids)
        assert batch["input_ids"][row, :n].tolist() == ids.tolist()
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["labels"][row, 1:n].tolist() == np.where(supervised, ids, IGNORED)[1:].tolist()
        assert (batch["labels"][row, n:] == IGNORED).all()
        assert (batch["input_ids"][row, n:] == batch["input_ids"][0, 0]).all()
        # pad is the end mark here (SmolLM2): the reply's own stays supervised
        assert batch["labels"][row, n - 2] == 2


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_every_document_gets_one_group_of_rows_that_fits(lengths: list[int]) -> None:
    groups, count = assign_rows(np.array(lengths, np.int32), 64)
    assert sorted(set(groups.tolist())) == list(range(count))
    for group in range(count):
        rows = np.array(lengths)[groups == group]
        assert len(rows) * rows.max() <= 64


def test_rows_of_chat_lengths_are_little_padding() -> None:
    lengths = chat_lengths(20_000)
    groups, count = assign_rows(lengths, 2**14)
    longest = np.zeros(count, np.int64)
    np.maximum.at(longest, groups, lengths)
    assert lengths.sum() / (longest * np.bincount(groups)).sum() > 0.98
    # about as many micro-batches, and so optimizer steps, as packs
    assert count <= 1.1 * assign_packs(lengths, 2**14)[1]


def test_rows_hold_a_packs_tokens_and_each_document_once_an_epoch(proof: Proof) -> None:
    config = Config.make(data="rows.jsonl", max_length=256, micro_batch=2, layout="padded", seed=3)
    batches, again = (micro_batches(proof.train, config) for _ in range(2))
    assert isinstance(batches, GroupedBatches)
    assert batches.fill > 0.9
    n = batches.per_epoch
    positions = [2 * n + 3, 0, n + 1]  # any order of asking, as after a resume
    asked = [batches.batch(p)["input_ids"].tolist() for p in positions]
    assert asked == [again.batch(p)["input_ids"].tolist() for p in reversed(positions)][::-1]
    for epoch in range(2):
        seen = [m for at in range(n) for m in batches.members(epoch * n + at)]
        assert sorted(seen) == list(range(len(proof.train)))
    for position in range(n):
        batch = batches.batch(position)
        lengths = [len(proof.train[int(member)][0]) for member in batches.members(position)]
        assert batch["input_ids"].numel() == len(lengths) * max(lengths) <= 512
        assert batch[LENGTHS] == tuple(lengths) == tuple(batch["attention_mask"].sum(1).tolist())


def test_trainers_that_insist_on_a_dataset_get_one(proof: Proof) -> None:
    batches = packs(proof)
    dataset = batches.dataset(3 * batches.per_epoch)
    assert len(dataset) == 3 * batches.per_epoch
    batch = batches.collate([dataset[batches.per_epoch + 1]])
    assert batch["input_ids"].tolist() == batches.batch(batches.per_epoch + 1)["input_ids"].tolist()


def test_loss_and_lora_gradients_of_a_pack_are_those_of_its_documents(proof: Proof, model_folder: Path) -> None:
    torch.manual_seed(0)
    # The real weights' first layers: four are enough for documents to meet in attention again and again.
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, num_hidden_layers=4)
    assert model.config._attn_implementation == "sdpa"
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    batches = packs(proof, tokens=320)
    position = max(range(batches.per_epoch), key=lambda p: len(batches.members(p)))
    members = batches.members(position)
    total = sum(int(proof.train[int(m)][1][1:].sum()) for m in members)

    def gradients(inputs: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = torch.zeros(())
        for one in inputs:
            part = model(**one, num_items_in_batch=total, use_cache=False).loss
            part.backward()
            loss += part.detach()
        return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone = []
    for member in members:
        ids, supervised = proof.train[int(member)]
        tokens = torch.tensor(ids, dtype=torch.int64)[None]
        mask = torch.tensor(supervised)[None]
        alone.append({"input_ids": tokens, "labels": torch.where(mask, tokens, IGNORED)})
    batch = batches.batch(position)
    del batch[LENGTHS]
    loss, packed = gradients([batch])
    expected_loss, expected = gradients(alone)
    assert len(members) > 3
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        distance = (packed[name] - gradient).norm() / gradient.norm()
        assert distance < 1e-5, name
