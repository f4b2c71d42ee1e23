"""Whether a model trains here: what the plan says of cards that hold it, that hold less of it, and that don't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from slimtune.cli.fits import fit_here, fit_of
from slimtune.config import Config
from slimtune.hardware import Card
from slimtune.training.forecast import Forecaster, gib

MIB = 1 << 20
CARD = Card("a card", 4096 * MIB, (8, 0))


@pytest.fixture(scope="module")
def forecaster(tiny_model: Path) -> Forecaster:
    return Forecaster(Config.make(model=str(tiny_model), max_length=131_072))


def fit(forecaster: Forecaster, mib: int, *, gpu: bool = True) -> tuple[bool | None, int | None, str]:
    found = fit_of(forecaster, replace(CARD, memory_bytes=mib * MIB), mib * MIB if gpu else None, 0)
    return found.trains, found.max_length, " ".join(found.said)


def test_of_a_gpu_it_says_what_a_run_takes_and_the_longest_document(forecaster: Forecaster) -> None:
    trains, shorter, said = fit(forecaster, 4096)
    planned = forecaster.with_longest(CARD, 4096 * MIB, 0)
    assert (trains, shorter) == (True, None)
    assert f"The longest document may have {planned.longest:,} tokens." in said
    assert "of 4.0GiB (a card)" in said


def test_where_only_shorter_documents_fit_the_config_gets_their_length(forecaster: Forecaster) -> None:
    assert fit(forecaster, 60)[::2] == (
        False,
        "It doesn't train here. With documents of 131,072 tokens it takes "
        f"{gib(forecaster.with_longest(CARD, 60 * MIB, 0).nbytes)} of 60MiB (a card).",
    )
    trains, shorter, said = fit(forecaster, 240)
    assert trains
    assert f"It trains here with documents of up to {shorter:,} tokens." in said
    config = forecaster.config.model_copy(update={"max_length": shorter})
    assert Forecaster(config).forecast(CARD, 240 * MIB, 0).trains


def test_without_a_gpu_ram_is_what_counts(forecaster: Forecaster) -> None:
    assert fit(forecaster, 1 << 20, gpu=False)[:2] == (True, None)
    assert fit(forecaster, 100, gpu=False)[0] is False


def test_what_cant_be_known_is_said(forecaster: Forecaster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    found = fit_here(str(tmp_path))
    assert found.trains is False
    assert found.said[0].startswith("It doesn't train here: ")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "a sequence-to-sequence model (t5)" in fit_here(str(tmp_path)).said[0]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = fit_here("nobody/nothing")
    assert found.trains is None
    assert found.said[0].startswith("Whether it trains here isn't known: ")
    plain = Forecaster(forecaster.config.model_copy(update={"engine": "plain"}))
    assert fit(plain, 8192)[0] is None
    assert fit(plain, 1)[0] is False
