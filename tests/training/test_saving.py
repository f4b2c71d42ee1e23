"""What is copied after the next step has begun is what the step before left."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from slimtune.adapter.state import adapter_tensors
from slimtune.run.identity import Identity
from slimtune.training import saving
from slimtune.training.checkpoint import OffDevice
from slimtune.training.rng import RandomState
from slimtune.training.saving import Moment, Trained, snapshot

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


IDENTITY = Identity({}, "base", {}, "tokenizer", "template", "3.11", {})


def trained(device: str) -> Trained:
    torch.manual_seed(0)
    architecture = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(architecture), lora).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    return Trained(model, adapter_tensors(model), optimizer, schedule)


def step(on: Trained, device: str) -> None:
    ids = torch.arange(16, device=device)[None]
    on.model(input_ids=ids, labels=ids).loss.backward()
    on.optimizer.step()
    on.schedule.step()
    on.optimizer.zero_grad()


def moment(device: str, loss: float) -> Moment:
    logs = {"loss": torch.tensor(loss, device=device), "total": 1.0, "step": 0}
    return Moment(1, 4, (RandomState.capture(), None), logs, {"pieces": 1}, {"global_step": 1})


@pytest.mark.parametrize("device", DEVICES)
def test_the_next_step_changes_nothing_of_what_is_saved(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(tensors: Iterable[torch.Tensor]) -> OffDevice:
        if device == "cuda":
            torch.cuda._sleep(200_000_000)  # a tenth of a second: the step must wait for copies that begin after it
        return OffDevice(tensors)

    monkeypatch.setattr(saving, "OffDevice", late)
    on = trained(device)
    step(on, device)
    before = {name: tensor.detach().clone() for name, tensor in on.adapter.items()}
    averages = [state["exp_avg"].cpu().clone() for state in on.optimizer.state.values()]
    now = moment(device, 2.5)
    made = snapshot(now, on, IDENTITY)
    step(on, device)
    now.logs["loss"].zero_()
    saved = made()
    assert all(torch.equal(saved.tensors["adapter_model"][name], tensor.cpu()) for name, tensor in before.items())
    written = list(saved.tensors["optimizer"].values())
    assert all(any(torch.equal(average, tensor) for tensor in written) for average in averages)
    assert b'"loss": 2.5' in saved.texts["state.json"]
    assert all(not torch.equal(on.adapter[name].detach(), tensor) for name, tensor in before.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_do_not_wait_for_what_came_after_the_moment() -> None:
    on = trained("cuda")
    step(on, "cuda")
    now = moment("cuda", 1.0)
    torch.cuda._sleep(2_000_000_000)  # about a second
    after = torch.cuda.Event()
    after.record()
    snapshot(now, on, IDENTITY)()
    assert not after.query()
    after.synchronize()


def test_what_was_written_is_put_back() -> None:
    on = trained("cpu")
    step(on, "cpu")
    saved = snapshot(moment("cpu", 1.0), on, IDENTITY)()
    other = trained("cpu")
    other.load(json.loads(saved.texts["state.json"])["plain"], saved.tensors["optimizer"])
    assert other.schedule.state_dict() == on.schedule.state_dict()
    for mine, theirs in zip(on.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
