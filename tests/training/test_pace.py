"""The plan's time for a step, against steps that were measured once (the others of them: ``benchmarks/pace.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3MoeConfig

from slimtune.config import Config
from slimtune.engine.fp8_head import Fp8Head
from slimtune.hardware import CARDS, Card, known_card
from slimtune.training.forecast import Forecaster
from tests.training.headers import headers

QWEN_1_8B = Qwen2Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=16, tie_word_embeddings=False,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
SIX_OF_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=6,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    norm_topk_prob=True, tie_word_embeddings=False,
)  # fmt: skip
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def forecaster(tmp_path: Path) -> Callable[..., Forecaster]:
    def made(
        config: Any, rows: int, lengths: list[int] | None = None, cards: int = 1, accumulation: int = 1,
        precision: Any = "auto", length: int = 2048, layers: list[int] | None = None,
    ) -> Forecaster:  # fmt: skip
        tokens = rows * length
        return Forecaster(
            Config.make(
                model=str(headers(tmp_path / "model", config)), max_length=length, micro_batch=rows, pack_tokens=tokens,
                targets=QKVO, lora_r=8, gradient_accumulation=accumulation, precision=precision, layers=layers,
            ),
            lengths,
            cards,
        )  # fmt: skip

    return made


@pytest.mark.parametrize(
    ("config", "rows", "steps"),
    [
        (QWEN_1_8B, 8, {120.0: 210.6, 3.9: 287.0}),
        (QWEN_7B, 4, {120.0: 415.0, 8.0: 553.2}),
        (SIX_OF_30B_A3B, 4, {120.0: 50.7, 7.3: 60.75, 5.1: 74.45, 3.2: 96.3}),
    ],
    ids=["dense", "wide", "mixture"],
)
def test_within_15_percent_of_what_was_measured(
    config: Any, rows: int, steps: dict[float, float], forecaster: Callable[..., Forecaster]
) -> None:
    of = forecaster(config, rows)
    for gib, milliseconds in steps.items():
        told = of.forecast(CARDS["H200"], int(gib * 2**30))
        assert 1e3 * told.step_seconds == pytest.approx(milliseconds, rel=0.15)


def test_weights_from_ram_come_as_fast_as_a_cards_bus(forecaster: Callable[..., Forecaster]) -> None:
    of, budget = forecaster(SIX_OF_30B_A3B, 1), int(2.5 * 2**30)
    slower = replace(CARDS["H200"], capability=(8, 0))  # PCIe 4.0
    fast, slow = (of.forecast(card, budget) for card in (CARDS["H200"], slower))
    assert fast.streamed_layers
    assert fast.streamed_layers == slow.streamed_layers
    assert fast.step_seconds < 0.8 * slow.step_seconds


def test_fp8_takes_what_was_measured_and_only_where_a_card_has_it(forecaster: Callable[..., Forecaster]) -> None:
    of = forecaster(QWEN_1_8B, 8, precision="fp8")
    assert 1e3 * of.forecast(CARDS["H200"]).step_seconds == pytest.approx(168.4, rel=0.15)
    assert of._in_fp8(CARDS["A100"]) == 0.0
    assert of.forecast(CARDS["A100"]).step_seconds > 2 * of.forecast(CARDS["H200"]).step_seconds


def test_the_heads_way_back_in_fp8_takes_less_and_is_worth_its_room(
    forecaster: Callable[..., Forecaster], monkeypatch: pytest.MonkeyPatch
) -> None:
    of, card = forecaster(QWEN_1_8B, 8, precision="fp8"), CARDS["H200"]
    tight = of._plan(card, of.config.batch_tokens, of.config.max_length, 3 << 30, 0)
    assert tight.turned_head
    seconds = of.forecast(card).step_seconds
    monkeypatch.setattr(Fp8Head, "bytes_of", lambda *shape: 0)
    assert of._plan(card, of.config.batch_tokens, of.config.max_length, 3 << 30, 0).head_tokens > tight.head_tokens
    assert 1.01 * seconds < of.forecast(card).step_seconds < 1.06 * seconds


def test_a_slower_card_takes_longer_and_an_unknown_one_is_not_guessed(forecaster: Callable[..., Forecaster]) -> None:
    of = forecaster(QWEN_1_8B, 8)
    budget = 8 << 30
    seconds = [of.forecast(CARDS[name], budget).step_seconds for name in ("H200", "H100", "RTX 4090", "T4")]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]
    assert of.forecast(Card("new", 80 << 30, (9, 0)), budget).step_seconds == 0.0


def test_short_documents_attend_to_less(forecaster: Callable[..., Forecaster], tmp_path: Path) -> None:
    long = forecaster(QWEN_1_8B, 8).forecast(CARDS["H200"]).step_seconds
    (tmp_path / "model").rename(tmp_path / "other")
    short = forecaster(QWEN_1_8B, 8, [128] * 128).forecast(CARDS["H200"]).step_seconds
    assert 0.8 * long < short < long


def test_documents_of_many_lengths_attend_more_slowly(forecaster: Callable[..., Forecaster], tmp_path: Path) -> None:
    """They have FlashAttention-2, and rows of one length cuDNN; before Hopper that is no faster."""
    rows, mixed = [2048] * 8, [2048] * 7 + [2047]
    of = forecaster(QWEN_1_8B, 8, rows)
    (tmp_path / "model").rename(tmp_path / "other")
    others = forecaster(QWEN_1_8B, 8, mixed)
    assert others.forecast(CARDS["H200"]).step_seconds > 1.05 * of.forecast(CARDS["H200"]).step_seconds
    assert others.forecast(CARDS["A100"]).step_seconds < of.forecast(CARDS["A100"]).step_seconds


def test_layers_below_the_lowest_adapter_have_no_way_back(
    forecaster: Callable[..., Forecaster], tmp_path: Path
) -> None:
    all_of_them = forecaster(QWEN_1_8B, 8).forecast(CARDS["H200"]).step_seconds
    (tmp_path / "model").rename(tmp_path / "other")
    upper = forecaster(QWEN_1_8B, 8, layers=list(range(12, 24))).forecast(CARDS["H200"]).step_seconds
    assert 0.6 * all_of_them < upper < 0.8 * all_of_them


def test_few_tokens_without_a_graph_take_what_a_host_takes(forecaster: Callable[..., Forecaster]) -> None:
    """126 to 243 ms in six calls."""
    of, card = forecaster(QWEN_1_8B, 1, length=512), CARDS["H200"]
    told = of.forecast(card, 1 << 30)
    assert told.streamed_layers == 24
    assert told.launched
    assert 0.126 < told.step_seconds < 0.243
    assert of.forecast(replace(card, tflops=2 * card.tflops), 1 << 30).step_seconds == pytest.approx(told.step_seconds)
    recorded = of.forecast(card, 16 << 30)
    assert recorded.step_seconds < 0.2 * told.step_seconds
    assert not recorded.launched


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA TITAN V", None),
    ],
)
def test_a_device_s_name_says_which_card_it_is(device: str, card: str | None) -> None:
    found = known_card(device)
    assert (None if found is None else found.name) == card


def test_several_cards_share_a_step_and_add_up_their_gradients(
    forecaster: Callable[..., Forecaster], tmp_path: Path
) -> None:
    one = forecaster(QWEN_1_8B, 8, accumulation=16).forecast(CARDS["RTX 4090"])
    (tmp_path / "model").rename(tmp_path / "other")
    of_16 = forecaster(QWEN_1_8B, 8, cards=16, accumulation=16)
    eight = of_16.forecast(CARDS["RTX 4090"])
    nbytes = 4 * of_16.adapter_parameters
    # In a host of eight 2 * 7/8 of the gradient over the bus, then the whole of it between two hosts at 100 Gb/s.
    assert eight.sum_seconds == pytest.approx(nbytes * (1.75 / 25e9 + 1 / 12.5e9))
    assert eight.step_seconds == pytest.approx(one.step_seconds / 16 + eight.sum_seconds)
    assert one.sum_seconds == 0.0
