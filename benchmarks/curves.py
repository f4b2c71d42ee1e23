"""Shows that fused and unfused runs learn the same: python benchmarks/curves.py MODEL DATA [--steps 200]

Trains LoRA on MODEL (a folder or hub id; SmolLM2-135M in the kept results) with DATA (alpaca-like rows), dropout 0, the
same seed and order, by `slimtune train`'s own recipe: unfused in bf16, fused in bf16, fused in fp16 as a T4-class card
needs it (memory capped at 15 GiB, and its kernel for attention), fused with padding instead of packing. Writes each
loss curve, the mean relative difference from the unfused one, and any non-finite value.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers import HERE, machine

from slimtune.config import Config
from slimtune.recipes import finetune

CAP = 15 * 2**30
RUNS: dict[str, dict[str, Any]] = {
    "unfused": {"engine": "plain"},
    "fused": {"engine": "fused"},
    "fused, fp16, 15 GiB": {"engine": "fused", "compute_dtype": "fp16", "memory": "15GiB"},
    "fused, least memory": {"engine": "fused", "memory": "1MiB"},
    "unfused, padded": {"engine": "plain", "packing": False},
    "fused, padded": {"engine": "fused", "packing": False},
}
PAIRS = {
    "fused": "unfused",
    "fused, fp16, 15 GiB": "unfused",
    "fused, least memory": "fused",
    "fused, padded": "unfused, padded",
}


def curve(model: str, data: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """The losses of one run, and its speed and peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        share = CAP / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share) if "fp16" in options.values() else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        config = Config.make(
            model=model, data=data, output=Path(folder) / "run", max_length=1024, micro_batch=2, max_steps=steps,
            gradient_accumulation=1, learning_rate=2e-4, lora_dropout=0.0, seed=1,
            **({"compute_dtype": "bf16"} if torch.cuda.is_available() else {}) | options,
        )  # fmt: skip
        as_a_t4 = options.get("compute_dtype") == "fp16" and torch.cuda.is_available()
        with mock.patch("slimtune.engine.inputs.choose", return_value="efficient") if as_a_t4 else nullcontext():
            run = finetune(config)
        records = [record for record in run.metrics() if "step_seconds" in record]
    losses = [record["loss"] for record in records]
    return {
        "losses": losses,
        "grad_norms": [record.get("grad_norm") for record in records],
        "nonfinite": sum(loss is None or not math.isfinite(loss) for loss in losses),
        "tokens_s": statistics.median(record["tokens"] / record["step_seconds"] for record in records),
        "peak_gib": max(record["memory_bytes"] for record in records) / 2**30,
    }


def difference(a: list[float], b: list[float]) -> dict[str, float]:
    """Of two curves: the mean of the relative differences' magnitudes, and the relative difference of their means."""
    return {
        "mean_of_differences": statistics.fmean(abs(x - y) / y for x, y in zip(a, b, strict=True)),
        "difference_of_means": abs(statistics.fmean(a) - statistics.fmean(b)) / statistics.fmean(b),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", help="only these, separated by ;")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    about = machine()
    results: dict[str, Any] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.runs.split(";") if options.runs else RUNS:
        results[name] = curve(options.model, options.data, options.steps, RUNS[name])
        other = PAIRS.get(name)
        if other in results:
            results[name]["against"] = {other: difference(results[name]["losses"], results[other]["losses"])}
        summary = {key: value for key, value in results[name].items() if key not in ("losses", "grad_norms")}
        print(json.dumps({name: summary, "first": results[name]["losses"][0], "last": results[name]["losses"][-1]}))
        written = {**about, "steps": options.steps, "results": results}
        (options.out / f"{about['date']}-curves.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
