"""How near the plan's time for a step comes to steps that were measured: python benchmarks/pace.py [--fit] [OUT.json]

The steps are those of other benchmarks on one H200 (their files beside each), the forecasts made without a card, from a
config and a file of a header alone. ``--fit`` prints the six rates that suit them best, for
``src/slimtune/training/pace.py``: least squares of the relative errors; and how far each step is off by rates that were
fitted to the others alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import decoders  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from workloads import ATTENTION, SIZES  # noqa: E402

from slimtune.config import Config  # noqa: E402
from slimtune.hardware import CARDS  # noqa: E402
from slimtune.training import pace  # noqa: E402
from slimtune.training.forecast import Forecaster  # noqa: E402
from tests.training.headers import headers  # noqa: E402

FACTORS = ("_AGAIN", "_UNPACKED", "_PARAMETER")
RATES = ("_PRODUCTS", "_ATTENTION", "_PASSES", *FACTORS)
"""Of :mod:`slimtune.training.pace`: something is divided by the first three, and multiplied with the factors."""


class Point(NamedTuple):
    """One measured step."""

    shape: str
    rows: int
    length: int
    milliseconds: float
    source: str
    memory: float | None = None
    """GiB."""
    layers: int | None = None
    targets: Any = "auto"
    r: int = 8


BY_TURNS, BUDGET, MEMORY = "engine-by-turns", "engine-budget-by-turns", "memory"
ROWS, STATES, WHOLE = "decoders", "decoders-states", "whole-mixture"
POINTS = (
    Point("1.8b", 8, 2048, 210.6, BUDGET, targets=ATTENTION),
    Point("1.8b", 8, 2048, 287.0, BUDGET, memory=3.9, targets=ATTENTION),
    Point("1.8b", 2, 512, 14.4, BY_TURNS, targets=ATTENTION),
    Point("7b", 4, 2048, 415.0, BY_TURNS, targets=ATTENTION),
    Point("8b", 1, 16384, 487.5, MEMORY, memory=6.4, layers=8, targets="all-linear", r=32),
    Point("8b", 1, 65536, 3698.0, MEMORY, memory=13.0, layers=8, targets="all-linear", r=32),
    Point("8b", 1, 131072, 48696.0, "memory-all-layers", memory=24.0, targets="all-linear", r=32),
    Point("moe", 4, 2048, 50.7, ROWS),
    Point("moe", 4, 2048, 60.75, ROWS, memory=7.3),
    Point("moe", 4, 2048, 74.45, ROWS, memory=5.1),
    Point("moe", 4, 2048, 71.35, ROWS, targets="all-linear", r=16),
    Point("gemma3", 4, 2048, 88.15, STATES),
    Point("gemma3", 4, 2048, 123.25, ROWS, memory=3.5),
    Point("gemma3", 4, 2048, 91.9, ROWS, targets="all-linear", r=16),
    Point("gemma4", 4, 2048, 126.05, STATES),
    Point("gemma4", 4, 2048, 156.15, STATES, memory=5.8),
    Point("gpt-oss", 4, 2048, 91.65, STATES),
    Point("gpt-oss", 4, 2048, 161.5, STATES, memory=6.8),
    Point("gpt-oss", 4, 2048, 104.1, "decoders-all", targets="all-linear", r=16),
    Point("qwen3.5", 4, 2048, 187.45, STATES),
)
"""Files in ``benchmarks/results``, dated 2026-11-29; with the shapes of ``decoders.py`` and ``workloads.py``."""
STREAMED = (
    Point("moe", 4, 2048, 96.3, "plan-again", memory=3.2),
    Point("moe", 4, 2048, 604.5, WHOLE, memory=6.75, layers=48),
    Point("moe", 8, 2048, 827.7, WHOLE, memory=6.75, layers=48),
    Point("moe", 16, 2048, 1560.9, WHOLE, memory=6.75, layers=48),
)
"""The same; weights come from RAM. What a step waits for them is no sum of terms, so they are in no fit."""


def config_of(point: Point) -> Any:
    if point.shape in SIZES:
        values = dict(SIZES[point.shape])
        values["num_hidden_layers"] = point.layers or values["num_hidden_layers"]
        kind = transformers.LlamaConfig if point.shape == "8b" else transformers.Qwen2Config
        return kind(**values, max_position_embeddings=1 << 20, tie_word_embeddings=False)
    name, options = decoders.SHAPES[point.shape]
    options = {**options, "num_hidden_layers": point.layers or options["num_hidden_layers"]}
    return getattr(transformers, name)(**options, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2)


def forecaster_of(point: Point, folder: Path) -> Forecaster:
    return Forecaster(
        Config.make(
            model=str(headers(folder, config_of(point))), max_length=point.length, micro_batch=point.rows,
            pack_tokens=point.rows * point.length, targets=point.targets, lora_r=point.r, train_on="all",
            gradient_accumulation=1,
        )
    )  # fmt: skip


def seconds(point: Point, forecaster: Forecaster) -> float:
    """The plan's, on the card that was measured."""
    return forecaster.forecast(CARDS[pace.MEASURED], int((point.memory or 120) * 2**30)).step_seconds


def terms(points: tuple[Point, ...], folder: Path) -> torch.Tensor:
    """[points, rates]: the terms that each forecast is a sum of, over what was measured; told one by one, its factor 1
    and the others' 0. Nothing is waited for: of these points copies take a hundredth at most."""
    before = {name: getattr(pace, name) for name in RATES}
    forecasters = [forecaster_of(point, folder / str(number)) for number, point in enumerate(points)]
    found = torch.empty(len(points), len(RATES), dtype=torch.float64)
    try:
        for column, name in enumerate(RATES):
            for other in RATES:
                setattr(pace, other, 1.0 if other == name else 0.0 if other in FACTORS else float("inf"))
            for row, (point, forecaster) in enumerate(zip(points, forecasters, strict=True)):
                with mock.patch.object(pace.Step, "_waited", return_value=0.0):
                    found[row, column] = seconds(point, forecaster) / point.milliseconds * 1e3
    finally:
        for name, value in before.items():
            setattr(pace, name, value)
    return found


def fitted(found: torch.Tensor) -> torch.Tensor:
    """What each term is to be multiplied with."""
    scale, ones = found.amax(0), torch.ones(len(found), 1, dtype=found.dtype)
    return torch.linalg.lstsq(found / scale, ones).solution[:, 0] / scale


def left_out(found: torch.Tensor) -> list[float]:
    """The error of each step by rates that were fitted to the others alone."""
    numbers = range(len(found))
    others = [torch.tensor([other != number for other in numbers]) for number in numbers]
    return [float(found[number] @ fitted(found[kept])) - 1 for number, kept in zip(numbers, others, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if options.fit:
            found = terms(POINTS, Path(scratch) / "fit")
            rates = zip(RATES, fitted(found).tolist(), strict=True)
            print(json.dumps({name: value if name in FACTORS else 1 / value for name, value in rates}))
            errors = left_out(found)
            print(json.dumps({"left_out": [round(error, 4) for error in errors]}))
            print(f"worst of steps left out of the fit {max(map(abs, errors)):.1%}")
        for number, point in enumerate((*POINTS, *STREAMED)):
            forecast_ms = 1e3 * seconds(point, forecaster_of(point, Path(scratch) / str(number)))
            case = f"{point.rows} x {point.length}, r={point.r}" + (f" within {point.memory}" if point.memory else "")
            rows.append({"shape": point.shape, "case": case, "measured_ms": point.milliseconds,
                         "forecast_ms": round(forecast_ms, 2), "error": round(forecast_ms / point.milliseconds - 1, 4),
                         "source": point.source})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    worst = max(abs(row["error"]) for row in rows)
    print(f"worst {worst:.1%} of {len(rows)}")
    if options.out:
        facts = {"date": date.today().isoformat(), "gpu": f"NVIDIA {pace.MEASURED}", "worst": worst, "results": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
