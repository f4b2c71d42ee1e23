"""doctor: what it finds here, and nothing of what libraries say on the way."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from slimtune.cli.doctor import command
from slimtune.hardware import Card, Hardware
from slimtune.language import Lang, spoken


def test_it_finds_this_machine_and_prints_nothing_else() -> None:
    words = [sys.executable, "-m", "slimtune", "doctor", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "cache", "4-bit bases"} <= found.keys()
    assert {"CPU", "GPU"} & found.keys()
    assert all(finding["well"] for finding in found.values())


@pytest.mark.parametrize(
    ("capability", "lang", "said"),
    [
        ((9, 0), "en", "taken by --precision fp8"),
        ((8, 0), "en", "no FP8: that begins with 8.9"),
        ((9, 0), "zh", "试验"),
    ],
)
def test_it_says_whether_a_card_multiplies_fp8(
    capability: tuple[int, int], lang: Lang, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card("a card", 24 << 30, capability)
    here = Hardware("cuda", card.name, card.memory_bytes, "bf16", "bf16 is native there", 2)
    monkeypatch.setattr(Hardware, "card", card)
    monkeypatch.setattr("slimtune.hardware.detect", lambda: here)
    with spoken(lang):
        shown = CliRunner().invoke(command).output
    assert said in next(line for line in shown.splitlines() if " FP8 " in line)
