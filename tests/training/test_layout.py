"""A run on a model whose packs would mix documents: unpacked, said, resumed as it was."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from slimtune.batch import LENGTHS, MicroBatch
from slimtune.config import Config
from slimtune.recipes import finetune, resume
from slimtune.run.folder import RunFolder
from slimtune.training.layout import Layout, LayoutTrainer
from slimtune.training.plain import PlainTrainer
from slimtune.use import rehearse as rehearsal
from tests.campaigns import campaign
from tests.tolerances import GRADIENT
from tests.training import families

NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short convolution and an attention layer, over bytes."""
    folder = campaign.make_model(tmp_path_factory.mktemp("model") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Lfm2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, layer_types=["conv", "full_attention"], **shape,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(folder)
    return folder


def run(model: Path, output: Path, **more: Any) -> RunFolder:
    rows = campaign.make_rows(output.parent / "rows.jsonl")
    values: dict[str, Any] = {
        "max_steps": 3, "max_length": 128, "micro_batch": 4, "learning_rate": 1e-2, "compute_dtype": "fp32",
        "quantization": "none", "lora_dropout": 0.0, "optim": "adamw_torch", "eval_share": 0.2, "save_steps": 1,
        "targets": ("in_proj", "q_proj", "out_proj"),
    }  # fmt: skip
    return finetune(Config.make(model=str(model), data=(str(rows),), output=output, **{**values, **more}))


def test_a_run_goes_unpacked_and_every_layout_trains_the_same(hybrid: Path, tmp_path: Path) -> None:
    padded = run(hybrid, tmp_path / "padded")
    assert padded.config().layout == "padded"
    facts = padded.read_json(padded.facts_file)
    (choice,) = (choice for choice in facts["choices"] if choice["key"] == "layout")
    assert re.search("can't keep packed sequences apart|neighbours in a pack", choice["reason"])
    assert not facts["data"]["packed"]
    assert facts["data"]["fill"] > 0.8
    alone = run(hybrid, tmp_path / "alone", layout="alone")
    losses = [[m["loss"] for m in one.metrics() if m.get("loss") is not None] for one in (padded, alone)]
    evaluated = [[m["eval_loss"] for m in one.metrics() if m.get("eval_loss") is not None] for one in (padded, alone)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=GRADIENT)
    assert evaluated[0] == pytest.approx(evaluated[1], rel=GRADIENT)
    # What was recorded is what a resumed run takes: the same adapter, to the bit, from the second step's checkpoint on.
    want = load_file(padded.adapter / NAME)
    (padded.checkpoints / "checkpoint-3").rename(tmp_path / "away")
    again = resume(padded.path)
    assert again.config().layout == "padded"
    have = load_file(again.adapter / NAME)
    assert want.keys() == have.keys()
    assert all(torch.equal(value, have[name]) for name, value in want.items())


@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
def test_what_is_rehearsed_counts_a_quarter_on_every_path(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain path's adapter is the engine's, and neither is what answers that count as much as rows make of it."""

    def answer(model: Any, tokenizer: Any, config: Config, count: int, file: Path, beat: Any) -> None:
        said = [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "Yes, it is."}]
        file.write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(6)))

    monkeypatch.setattr(rehearsal, "answer", answer)
    model = campaign.make_model(tmp_path / "model")
    shared: dict[str, Any] = {
        "rehearse": 0.1,
        "optim": "adamw_8bit",
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "max_steps": 4,
    }
    plain = run(model, tmp_path / "plain", engine="plain", layout=layout, **shared)
    fused = run(model, tmp_path / "fused", engine="fused", layout=layout, **shared)
    adapters = [load_file(one.adapter / NAME) for one in (plain, fused)]
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-3, atol=1e-5)
    losses = [[m["loss"] for m in one.metrics() if m.get("loss") is not None] for one in (plain, fused)]
    assert losses[0] == pytest.approx(losses[1], rel=GRADIENT)
    assert fused.read_json(fused.facts_file)["data"]["rehearsed"]["weight"] == 0.25
    if layout != "packed":
        return
    monkeypatch.setattr(rehearsal, "ANSWER_WEIGHT", 1.0)
    whole = load_file(run(model, tmp_path / "whole", engine="fused", layout=layout, **shared).adapter / NAME)
    assert any((whole[name] - value).abs().max() > 1e-4 for name, value in adapters[1].items())


@pytest.mark.parametrize("layout", ["packed", "alone"])
def test_two_ranks_gradients_of_weighted_documents_sum_to_one_processs(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in however many pieces each micro-batch goes through the model."""

    def step(self: Any, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        loss = model(**inputs, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        return torch.as_tensor(loss.detach())

    monkeypatch.setattr(PlainTrainer, "training_step", step)
    model = families.make("llama")
    trainer = LayoutTrainer.__new__(LayoutTrainer)
    trainer.layout = Layout(model, layout)
    weights = (1.0, 0.25, 0.25, 1.0, 0.25, 1.0, 0.25)
    batches = [replace(families.documents(padded=False, seed=seed), weights=weights).inputs() for seed in (5, 6)]

    def gradient(*given: dict[str, Any]) -> torch.Tensor:
        model.zero_grad()
        for batch in given:
            trainer.training_step(model, batch, 130)
        return torch.cat([each.grad.reshape(-1) for each in model.parameters() if each.grad is not None])

    assert torch.equal(gradient(*batches), gradient(batches[0]) + gradient(batches[1]))


def test_pieces_of_alone_are_its_documents() -> None:
    model = families.make("llama")
    micro = families.documents(padded=True)
    pieces = Layout(model, "alone").pieces(micro.inputs())
    supervising = [part.lengths for part in micro.split(1) if part.supervised]
    assert [piece[LENGTHS] for piece in pieces] == supervising
    assert all(piece["input_ids"].shape[0] == 1 and bool(piece["attention_mask"].all()) for piece in pieces)


@pytest.mark.parametrize("boundaries", [True, False])
def test_a_model_gets_no_lengths_and_no_argument_that_it_does_not_take(boundaries: bool) -> None:
    batch = families.documents(padded=False).inputs()

    class Narrow(torch.nn.Linear):
        def forward(self, input_ids: Any, position_ids: Any, labels: Any, seq_idx: Any = None) -> Any:
            return input_ids

    with Layout(Narrow(1, 1), "packed", boundaries=boundaries).passed(batch) as passed:
        assert set(passed) == {"input_ids", "labels", "position_ids"} | ({"seq_idx"} if boundaries else set())
    with Layout(families.make("llama"), "packed", boundaries=boundaries).passed(batch) as passed:
        assert ("cu_seq_lens_q" in passed) == boundaries
        assert LENGTHS not in passed
    assert MicroBatch.of(batch).lengths == families.LENGTHS
    if boundaries:
        ends = torch.tensor(families.LENGTHS).cumsum(0)
        index = passed["seq_idx"][0]
        assert passed["cu_seq_lens_q"].tolist() == [0, *ends.tolist()]
        assert [int((index == at).sum()) for at in range(len(ends))] == list(families.LENGTHS)
