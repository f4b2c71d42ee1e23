"""Does FP8 learn what bf16 learns? python benchmarks/precision.py [MODEL] DATA [--seconds 190] [--workers 12]

Trains MODEL (SmolLM2-135M) on DATA (alpaca-like rows; the last 200 are held out of all runs) with three seeds, in bf16
and with ``precision: fp8`` in every projection, however small, 200 and 600 steps of two rows of 1,024 tokens, no
dropout, by `slimtune train`'s own recipe; and on the demo's task in FP8. Held-out loss is bf16's on the 4-bit base in
all of them. The last lines are the differences from the same seed's bf16. ``--tiny`` takes a few steps of each.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from curves import difference
from workers import measure, options_of

SEEDS = (1, 2, 3)
LENGTHS = (200, 600)
HELD_OUT = 200


def _halves(file: Path, folder: Path) -> tuple[Path, Path]:
    """DATA's rows but the last ones, and those."""
    rows = json.loads(file.read_text())
    halves = folder / "train.json", folder / "held.json"
    for half, part in zip(halves, (rows[:-HELD_OUT], rows[-HELD_OUT:]), strict=True):
        half.write_text(json.dumps(part))
    return halves


def _demo(folder: Path, seed: int, *, tiny: bool) -> dict[str, Any]:
    from slimtune import recipes

    settings = {"precision": "fp8", "engine": "fused", "compute_dtype": "bf16", **({"max_steps": 2} if tiny else {})}
    with mock.patch.dict(recipes.DEMO_SETTINGS, settings):
        result = recipes.demo(folder / "run", seed=seed)
    right = result.right(result.after)
    return {"right": sum(right), "of": len(right)}


def trained(job: dict[str, Any], base: str, *, tiny: bool, data: Path) -> dict[str, Any]:
    """One training, in a process where every projection counts as one that gains."""
    from slimtune.config import Config
    from slimtune.recipes import finetune

    with mock.patch("slimtune.engine.engine.pays", return_value=True), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if job["task"] == "demo":
            return {**job, **_demo(folder, job["seed"], tiny=tiny)}
        train, held = _halves(data, folder)
        steps = 3 if tiny else job["steps"]
        config = Config.make(
            model=base, data=str(train), eval=(str(held),), output=folder / "run", seed=job["seed"], max_steps=steps,
            precision=job["precision"], engine="fused", compute_dtype="bf16", max_length=128 if tiny else 1024,
            micro_batch=2, gradient_accumulation=1, learning_rate=2e-4, lora_dropout=0.0, max_dropped=0.9,
            eval_steps=steps, save_steps=steps, samples=0,
        )  # fmt: skip
        run = finetune(config)
        records = list(run.metrics())
    losses = [record["loss"] for record in records if "step_seconds" in record]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    return {**job, "held_out": held_out[-1], "before": held_out[0], "losses": losses}


def summary(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """By length: FP8's losses beside the same seed's in bf16, and the held-out losses of both."""
    yield from ({key: r[key] for key in ("task", "seed", "right", "of")} for r in results if r["task"] == "demo")
    of = {(r["steps"], r["precision"], r["seed"]): r for r in results if r["task"] == "curve"}
    for steps in LENGTHS:
        pairs = [(of.get((steps, "bf16", seed)), of.get((steps, "fp8", seed))) for seed in SEEDS]
        whole = [(bf16, fp8) for bf16, fp8 in pairs if bf16 and fp8]
        if whole:
            apart = [difference(fp8["losses"], bf16["losses"]) for bf16, fp8 in whole]
            yield {
                "steps": steps,
                **{
                    key: [round(each[key], 5) for each in apart]
                    for key in ("mean_of_differences", "difference_of_means")
                },
                "mean": round(statistics.fmean(each["mean_of_differences"] for each in apart), 5),
                "held_out_bf16": [round(bf16["held_out"], 5) for bf16, _ in whole],
                "held_out_fp8": [round(fp8["held_out"], 5) for _, fp8 in whole],
            }


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, nargs="*", default=list(LENGTHS), help="lengths of runs")
    parser.add_argument("--demo", type=int, default=1, help="runs of the demo's task")
    options = parser.parse_args()
    jobs: list[dict[str, Any]] = [
        {"task": "curve", "steps": steps, "seed": seed, "precision": precision}
        for steps, seed, precision in itertools.product(options.steps, SEEDS, ("bf16", "fp8"))
    ]
    jobs += [{"task": "demo", "steps": 0, "seed": seed, "precision": "fp8"} for seed in SEEDS[: options.demo]]
    measure(options, jobs, trained, summary, data=options.data)


if __name__ == "__main__":
    main()
