"""Every reason that slimtune gives for an automatic choice has its Chinese."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slimtune import hardware
from slimtune.config import Config
from slimtune.hardware import Hardware, detect
from slimtune.plan import resolve_amount, resolve_held_out, resolve_machine, resolve_rate, resolve_steps
from slimtune.run.reasons import reason_in_chinese
from tests.test_plan import documents_of


def machines(monkeypatch: pytest.MonkeyPatch) -> list[Hardware]:
    """What detect() finds on two CPUs and two GPUs."""
    found = []
    for native in (True, False):
        monkeypatch.setattr(hardware, "_cpu_has_bf16_gemm", lambda native=native: native)
        found.append(detect.__wrapped__())
    card = SimpleNamespace(major=7, minor=5, name="Some GPU", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        found.append(detect.__wrapped__())
    return found


def test_every_reason_has_its_chinese(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reasons = set()
    for machine in machines(monkeypatch):
        config, choices = resolve_machine(Config.make(data="rows.jsonl", eval_share=0.1), machine)
        choices += resolve_steps(config, 1000)[1]
        choices += resolve_steps(Config.make(epochs=0.3), 8)[1]
        for held in ((Config.make(), 0.2, 40), (Config.make(), 0.0, 12), (Config.make(eval="rows.jsonl"), 0.0, 0)):
            choices += resolve_held_out(*held)[1]
        choices += resolve_amount(Config.make(), documents_of(tmp_path / str(len(reasons)), 40), None)[1]
        choices += resolve_rate(Config.make(), 134_515_008)[1]
        reasons |= {choice.reason for choice in choices}
    assert len(reasons) >= 8
    for reason in reasons:
        chinese = reason_in_chinese(reason)
        assert re.search("[\u4e00-\u9fff]", chinese), reason
        # The figures and names in it are kept.
        assert set(re.findall(r"\d+(?:\.\d+)?%?", reason)) == set(re.findall(r"\d+(?:\.\d+)?%?", chinese)), reason


def test_an_unknown_reason_stays_as_it_is() -> None:
    assert reason_in_chinese("because of \\1") == "because of \\1"
