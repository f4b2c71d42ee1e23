"""How near the plan's time for a step comes to steps that were measured: python benchmarks/pace.py [--fit] [OUT.json]

The steps are those of other benchmarks on one H200 (their files beside each; the median where several were timed), the
forecasts made without a card, from a config and a file of a header alone. ``--fit`` prints the rates that suit them
best, for ``src/slimtune/training/pace.py``: least squares of the relative errors; and how far each step is off by rates
that were fitted to the others alone, and by those of all other shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import decoders  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from memory import cut_to  # noqa: E402
from workloads import ATTENTION, SIZES  # noqa: E402

from slimtune.config import Config  # noqa: E402
from slimtune.engine.blocks import Keep, Memory  # noqa: E402
from slimtune.engine.memory import MemoryPlan, plan_memory  # noqa: E402
from slimtune.hardware import CARDS  # noqa: E402
from slimtune.training import forecast, pace  # noqa: E402
from slimtune.training.forecast import Forecaster  # noqa: E402
from tests.training.headers import headers  # noqa: E402

FACTORS = ("_PARAMETER",)
RATES = ("_PRODUCTS", "_IN_FP8", "_ATTENTION", "_MOVED", *FACTORS)
"""Of :mod:`slimtune.training.pace`: something is divided by the first ones, and multiplied with the factors."""


class Point(NamedTuple):
    """One step, as often as it was measured."""

    shape: str
    rows: int
    length: int
    milliseconds: tuple[float, ...]
    source: str
    memory: float | None = None
    """GiB."""
    layers: int | None = None
    targets: Any = "auto"
    r: int = 8
    keep: Keep | None = None
    """What all layers were told to keep, instead of what a plan says, in chunks of 8,192 tokens."""
    in_ram: bool = False
    """That in RAM, but for the last layer's."""
    whole: int = 0
    """Layers of the model whose plan these few have."""
    lavish: bool = True
    """RAM may be taken where that only spares time, as where there is some; else where nothing fits without."""
    fp8: bool = False
    head_in_fp8: bool = False
    """The head's gradient too, as where it was measured since."""

    @property
    def case(self) -> str:
        within = f" within {self.memory:g}" if self.memory else ""
        layers = f", {self.layers} layers" if self.layers else ""
        kept = "" if self.keep is None else f", {self.keep.name.lower()} kept{' in RAM' * self.in_ram}"
        targets = {"auto": "", ALL: " on all linear", ATTENTION: " on q, k, v, o"}[self.targets]
        eighths = " fp8" * self.fp8 + " head" * self.head_in_fp8
        return f"{self.rows} x {self.length}, r={self.r}{targets}{layers}{kept}{eighths}{within}"


ALL = "all-linear"
PLAN, PLANS = "plan, plan-again, 11-30-plan, 11-30-plan-mended", "plan, plan-again, 11-30-plan-mended"
LONG, FP8, HEAD = "long-documents", "11-30-fp8-steps, 11-30-fp8-memory", "11-30-fp8-head-on-average-steps"
POINTS = (
    Point("1.8b", 8, 2048, (210.6, 209.0, 206.5, 202.7, 199.1, 211.2, 207.9), f"engine-by-turns, {PLANS}, {FP8}",
          targets=ATTENTION),
    Point("1.8b", 8, 2048, (287.0, 278.5, 281.8, 274.2, 276.6, 286.1), f"engine-budget-by-turns, {PLAN}, {FP8}",
          3.9, targets=ATTENTION),
    Point("1.8b", 2, 512, (14.4, 14.3, 14.2, 14.0), f"engine-by-turns, {PLANS}", targets=ATTENTION),
    Point("7b", 4, 2048, (415.0, 407.0, 403.5, 396.7, 395.9, 415.9, 414.9), f"engine-by-turns, {PLAN}, {FP8}",
          targets=ATTENTION),
    Point("7b", 4, 2048, (563.8, 560.1, 547.4, 553.2), PLAN, 8.0, targets=ATTENTION),
    Point("8b", 2, 4096, (513.3, 507.3, 515.9, 499.9), f"fp8-steps, {FP8}", targets=ALL, r=16),
    Point("8b", 1, 16384, (487.5, 489.9), "memory, memory-all-layers", None, 8, ALL, 32, Keep.INPUT),
    Point("8b", 1, 16384, (488.5, 477.4), "memory, memory-all-layers", None, 8, ALL, 32, Keep.INPUT, True),
    Point("8b", 1, 16384, (491.2,), LONG, None, 8, ALL, 16, Keep.INPUT, True),
    Point("8b", 1, 16384, (454.5,), LONG, None, 8, ALL, 16, Keep.ATTENDED, True),
    Point("8b", 1, 16384, (442.6,), LONG, None, 8, ALL, 16, Keep.ATTENTION, True),
    Point("8b", 1, 16384, (457.0,), LONG, None, 8, ALL, 16, Keep.ATTENDED),
    Point("8b", 1, 65536, (3698.0,), "memory", None, 8, ALL, 32, Keep.INPUT),
    Point("8b", 1, 65536, (3689.9,), "memory", None, 8, ALL, 32, Keep.INPUT, True),
    Point("8b", 1, 65536, (3277.8,), LONG, None, 8, ALL, 16, Keep.ATTENDED, True),
    Point("8b", 1, 65536, (3213.5,), LONG, None, 8, ALL, 16, Keep.ATTENTION, True),
    Point("8b", 1, 131072, (12154.3,), LONG, None, 8, ALL, 16, Keep.INPUT, True),
    Point("8b", 1, 131072, (10396.9,), LONG, None, 8, ALL, 16, Keep.ATTENDED, True),
    Point("8b", 1, 450048, (65940.2,), "longest", None, 4, ALL, 32, Keep.INPUT, True),
    Point("8b", 1, 65536, (14114.2,), "whole-mixture", None, 32, ALL, 32, Keep.INPUT, True),
    Point("8b", 1, 131072, (48696.0,), "memory-all-layers", None, 32, ALL, 32, Keep.INPUT, True),
    Point("8b", 1, 65536, (12113.7, 12061.0), f"{LONG}, 11-30-{LONG}", 13.8, targets=ALL, r=16),
    Point("8b", 1, 131072, (40243.0,), f"11-30-{LONG}", 24.0, targets=ALL, r=32),
    Point("8b", 1, 16384, (1638.5, 1631.4), "11-30-plan, 11-30-plan-mended", 10.0, targets=ALL, r=32),
    Point("8b", 1, 32768, (4223.0, 4223.9), "11-30-plan, 11-30-plan-mended", 11.0, targets=ALL, r=32),
    Point("moe", 4, 2048, (50.7, 53.0, 52.3, 50.2, 50.4, 49.0, 51.3), f"decoders, decoders-again, {PLANS}"),
    Point("moe", 4, 2048, (60.75, 61.3, 60.1, 60.7), "decoders, decoders-evening, 11-30-experts-fp8", 7.3),
    Point("moe", 4, 2048, (74.45, 76.85, 73.0, 72.7, 71.4, 75.7, 76.6), f"decoders, {PLANS}, 11-30-experts-fp8", 5.1),
    Point("moe", 4, 2048, (71.35, 80.9, 77.85), "decoders, decoders-again, decoders-evening", targets=ALL, r=16),
    Point("gemma3", 4, 2048, (88.15, 86.9, 87.0, 88.5, 86.6, 86.1, 84.1, 82.3), f"decoders, decoders-states, {PLAN}"),
    Point("gemma3", 4, 2048, (123.25, 122.3, 108.1, 107.4, 107.8), f"decoders, {PLAN}", 3.5),
    Point("gemma3", 4, 2048, (91.9,), "decoders", targets=ALL, r=16),
    Point("gemma4", 4, 2048, (126.05, 128.35, 129.65), "decoders-states, decoders-again, decoders-evening"),
    Point("gemma4", 4, 2048, (156.15, 159.8), "decoders-states, decoders-again", 5.8),
    Point("gemma4", 4, 2048, (139.55,), "decoders-evening", targets=ALL, r=16),
    Point("gpt-oss", 4, 2048, (91.65,), "decoders-states"),
    Point("gpt-oss", 4, 2048, (161.5,), "decoders-states", 6.8),
    Point("gpt-oss", 4, 2048, (104.1,), "decoders-all", targets=ALL, r=16),
    Point("qwen3.5", 4, 2048, (187.45, 187.35), "decoders-states, decoders-evening"),
    Point("qwen3.5", 4, 2048, (152.0, 149.7, 148.9), PLANS, targets=ATTENTION),
    Point("qwen3.5", 4, 2048, (195.45,), "decoders-evening", targets=ALL, r=16),
    Point("moe", 4, 2048, (276.8,), "whole-mixture", None, 48),
    Point("moe", 4, 2048, (388.9,), "whole-mixture", 22.6, 48, lavish=False),
    Point("moe", 16, 2048, (1520.3,), "whole-mixture", 22.6, 48, lavish=False),
    Point("moe", 1, 2048, (154.9,), "decoders", 18.0, 48, lavish=False),
    Point("70b", 1, 16384, (3209.1, 3267.0), "streamed, whole-mixture", 79.5, 20, whole=80),
    Point("70b", 1, 2048, (320.0,), "streamed", 79.5, 20, whole=80),
    Point("1.8b", 8, 2048, (174.3, 172.0), FP8, targets=ATTENTION, fp8=True),
    Point("1.8b", 8, 2048, (240.0,), "11-30-fp8-steps", 3.9, targets=ATTENTION, fp8=True),
    Point("7b", 4, 2048, (298.2, 296.0), FP8, targets=ATTENTION, fp8=True),
    Point("8b", 2, 4096, (391.3, 389.7), FP8, targets=ALL, r=16, fp8=True),
    Point("8b", 1, 65536, (10889.0,), f"11-30-{LONG}", 13.8, targets=ALL, r=16, fp8=True),
    Point("8b", 1, 32768, (3522.5,), "11-30-plan-mended", 11.0, targets=ALL, r=16, fp8=True),
    Point("moe", 4, 2048, (47.5, 47.4), "11-30-experts-fp8", fp8=True),
    Point("moe", 4, 2048, (54.5, 54.6), "11-30-experts-fp8", 7.3, fp8=True),
    Point("moe", 4, 2048, (68.6,), "11-30-experts-fp8", 5.1, fp8=True),
)  # fmt: skip
"""Files in ``benchmarks/results``, dated 2026-11-29 if not 11-30; with the shapes of ``decoders.py`` and
``workloads.py``."""
SINCE = (
    Point("1.8b", 8, 2048, (165.0, 165.75), HEAD, targets=ATTENTION, fp8=True, head_in_fp8=True),
    Point("7b", 4, 2048, (288.0,), HEAD, targets=ATTENTION, fp8=True, head_in_fp8=True),
    Point("8b", 2, 4096, (375.3,), HEAD, targets=ALL, r=16, fp8=True, head_in_fp8=True),
    Point("moe", 4, 2048, (44.1,), HEAD, fp8=True, head_in_fp8=True),
    Point("moe", 4, 2048, (50.3,), HEAD, 7.3, fp8=True, head_in_fp8=True),
)  # fmt: skip
"""The same, measured after the rates were fitted: in no fit either."""
STREAMED = (
    Point("moe", 4, 2048, (105.7, 96.3, 84.7), PLANS, 3.2),
    Point("moe", 4, 2048, (604.5,), "whole-mixture", 6.75, 48, lavish=False),
    Point("moe", 8, 2048, (827.7,), "whole-mixture", 6.75, 48, lavish=False),
    Point("moe", 16, 2048, (1560.9,), "whole-mixture", 6.75, 48, lavish=False),
    Point("70b", 1, 16384, (3321.2, 3353.3, 3296.9), "streamed, whole-mixture, 11-30-gpus-streamed", 11.5, 20,
          whole=80),
    Point("70b", 1, 2048, (356.0, 384.7), "streamed, 11-30-gpus-streamed", 11.5, 20, whole=80),
)  # fmt: skip
"""The same; weights come from RAM. What a step waits for them is no sum of terms, so they are in no fit."""
LAUNCHED = (
    Point("8b", 1, 2048, (391.0, 330.2, 477.7, 315.8), PLAN, 4.5, targets=ALL, r=32),
    Point("8b", 1, 2048, (239.1,), "streamed", 4.5, targets=ATTENTION),
    Point("1.8b", 1, 512, (125.5, 242.9, 239.3, 178.3, 170.8, 148.7), f"whole-mixture, {PLAN}", 1.0, targets=ATTENTION),
)
"""The same, of few tokens: what takes long is the host, and hosts differ by half and more."""


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
    targets = point.targets if isinstance(point.targets, str) else list(point.targets)
    return Forecaster(
        Config.make(
            model=str(headers(folder, config_of(point))), max_length=point.length, micro_batch=point.rows,
            pack_tokens=point.rows * point.length, targets=targets, lora_r=point.r, train_on="all",
            gradient_accumulation=1, precision="fp8" if point.fp8 else "auto",
        )
    )  # fmt: skip


@contextmanager
def planned(point: Point) -> Iterator[None]:
    """Within this, a plan is what the point's step was planned as."""

    def made(layers: Any, tokens: int, vocabulary: int, room: float, **options: Any) -> MemoryPlan:
        if not point.head_in_fp8:
            options["turned_head"] = 0
        if point.whole:
            return part_of(point, layers, tokens, vocabulary, room, options)
        plan = plan_memory(layers, tokens, vocabulary, room, **options)
        if point.keep is None:
            return plan
        away = tuple(range(len(layers) - 1)) if point.in_ram else ()
        memory = Memory(tokens, min(tokens, 8192), options["ways"], 0, sparing=True)
        sizes = tuple(layers[index].kept_bytes(memory, point.keep) for index in away)
        return replace(
            plan, keep=(point.keep,) * len(layers), kept_weights=0, kept_turned=0, mlp_tokens=min(tokens, 8192),
            head_tokens=1024, in_ram=away, ram_sizes=sizes,
        )  # fmt: skip

    with mock.patch.object(forecast, "plan_memory", made):
        yield


def part_of(point: Point, layers: Any, tokens: int, vocabulary: int, room: float, options: Any) -> MemoryPlan:
    """The plan of a whole model, for few layers like its own."""
    times, stored = point.whole // len(layers), list(options["stored"])
    options = {**options, "stored": stored * times, "ram": 1 << 62 if (point.memory or 0) < 20 else 0, "lavish": False}
    plan = plan_memory(list(layers) * times, tokens, vocabulary, room - (times - 1) * sum(stored), **options)
    return cut_to(len(layers), plan, stored)


def seconds(point: Point, forecaster: Forecaster) -> float:
    """The plan's, on the card that was measured."""
    budget = int((point.memory or 120) * 2**30)
    with planned(point):
        return forecaster.forecast(CARDS[pace.MEASURED], budget, 1 << 40 if point.lavish else None).step_seconds


def terms(points: tuple[Point, ...], folder: Path) -> torch.Tensor:
    """[points, rates]: the terms that each forecast is a sum of, over what was measured; told one by one, its factor 1
    and the others' 0. Nothing is waited for: of these points copies take a hundredth at most."""
    before = {name: getattr(pace, name) for name in RATES}
    found = torch.empty(len(points), len(RATES), dtype=torch.float64)
    try:
        for row, point in enumerate(points):
            forecaster, measured = forecaster_of(point, folder / str(row)), statistics.median(point.milliseconds)
            for column, name in enumerate(RATES):
                for other in RATES:
                    setattr(pace, other, 1.0 if other == name else 0.0 if other in FACTORS else float("inf"))
                with mock.patch.multiple(pace.Step, _copied=lambda *_: 0.0, launching=lambda *_: 0.0):
                    found[row, column] = seconds(point, forecaster) / measured * 1e3
    finally:
        for name, value in before.items():
            setattr(pace, name, value)
    return found


def fitted(found: torch.Tensor) -> torch.Tensor:
    """What each term is to be multiplied with."""
    scale, ones = found.amax(0).clamp(min=1e-30), torch.ones(len(found), 1, dtype=found.dtype)
    return torch.linalg.lstsq(found / scale, ones).solution[:, 0] / scale


def left_out(found: torch.Tensor, alike: Callable[[Point], object]) -> list[float]:
    """The error of each step by rates that were fitted to those alone that aren't alike."""
    errors = []
    for number, point in enumerate(POINTS):
        kept = torch.tensor([alike(other) != alike(point) for other in POINTS])
        errors.append(float(found[number] @ fitted(found[kept])) - 1)
    return errors


def fit(folder: Path) -> None:
    found = terms(POINTS, folder)
    rates = zip(RATES, fitted(found).tolist(), strict=True)
    print(json.dumps({name: value if name in FACTORS else 1 / value for name, value in rates}))
    left: tuple[tuple[str, Callable[[Point], object]], ...] = (
        ("the others'", lambda point: point), ("other shapes'", lambda point: point.shape),
    )  # fmt: skip
    for whose, alike in left:
        errors = left_out(found, alike)
        for point, error in sorted(zip(POINTS, errors, strict=True), key=lambda pair: -abs(pair[1]))[:5]:
            print(f"  {point.shape} {point.case}: {error:+.1%}")
        half = statistics.median(map(abs, errors))
        print(f"by {whose} rates: worst {max(map(abs, errors)):.1%}, half within {half:.1%}, of {len(errors)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    worst = {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.fit:
            fit(Path(scratch) / "fit")
        for what, points in (("fitted", POINTS), ("since", SINCE), ("streamed", STREAMED), ("launched", LAUNCHED)):
            for point in points:
                forecast_ms = 1e3 * seconds(point, forecaster_of(point, Path(scratch) / str(len(rows))))
                measured = statistics.median(point.milliseconds)
                rows.append({"shape": point.shape, "case": point.case, "what": what, "measured_ms": measured,
                             "all_ms": point.milliseconds, "forecast_ms": round(forecast_ms, 2),
                             "error": round(forecast_ms / measured - 1, 4), "source": point.source})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
            errors = [abs(row["error"]) for row in rows if row["what"] == what]
            worst[what] = max(errors)
            print(f"{what}: worst {worst[what]:.1%} of {len(errors)}, half within {statistics.median(errors):.1%}")
    if options.out:
        facts = {"date": date.today().isoformat(), "gpu": f"NVIDIA {pace.MEASURED}", "worst": worst, "results": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
