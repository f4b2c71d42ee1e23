"""Times slimtune's engine alone (no trainer): python benchmarks/engine.py [W1 W1@3.9 W2 ...] [--profile] [--as-a-t4]

A workload's name may end in @G, a memory budget in GiB: W1@3.9 is W1 within 3.9 GiB. Before that it may end in +fp8:
W1+fp8 is W1 with its frozen weights multiplied in FP8. --as-a-t4 computes in fp16 with the
attention that a T4 gets. Prints one JSON line each and a table last; with $OUT set, writes them there too.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from workloads import WORKLOADS, add_lora, make_model, packs

from slimtune.engine import Engine, FusedAdamW8bit

STEPS = 12


def measure(name: str, profile: bool, dtype: torch.dtype) -> dict[str, Any]:
    base, _, budget = name.partition("@")
    base, fp8, _ = base.partition("+fp8")
    workload = WORKLOADS[base]
    cuda = torch.cuda.is_available()
    sync = torch.cuda.synchronize if cuda else (lambda: None)
    batches = packs(workload, STEPS)
    model = add_lora(make_model(workload.size), workload)
    model.train()
    start = time.perf_counter()
    memory = int(float(budget) * 2**30) if budget else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    engine = Engine(
        model,
        dtype=dtype,
        tokens=workload.rows * workload.length,
        longest=workload.length,
        memory=memory,
        fp8=bool(fp8),
    )
    optimizer = FusedAdamW8bit(engine.flat, lr=2e-4)
    times, losses, first = [], [], 0.0
    for index, batch in enumerate(batches):
        sync()
        begin = time.perf_counter()
        supervised = int((batch["labels"] != -100).sum())
        tensors = {key: value for key, value in batch.items() if key != "real_tokens"}
        losses.append(engine.forward_backward(tensors, supervised))
        optimizer.clip_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        sync()
        times.append(time.perf_counter() - begin)
        if index == 0:
            first = time.perf_counter() - start
    step = statistics.median(times[4:])
    real = sum(batch["real_tokens"] for batch in batches) / len(batches)
    result = {
        "workload": name,
        "dtype": str(dtype).removeprefix("torch."),
        "fp8_share": round(engine.fp8_share, 3),
        "step_ms": round(step * 1e3, 2),
        "tokens_s": round(real / step),
        "first_step_s": round(first, 2),
        "second_step_s": round(times[1], 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None,
        "predicted_gib": round(engine.plan.nbytes / 2**30, 2),
        "keep": "".join(str(int(level)) for level in engine.plan.keep),
        "kept_weights": engine.plan.kept_weights,
        "kept_turned": engine.plan.kept_turned,
        "turned_head_gib": round(engine.plan.turned_head / 2**30, 3),
        "part_tokens": engine.plan.part_tokens,
        "mlp_tokens": engine.plan.mlp_tokens,
        "head_tokens": engine.plan.head_tokens,
        "loss": [round(float(loss), 3) for loss in (losses[0], losses[-1])],
        "gpu": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }
    print(json.dumps(result), flush=True)
    if profile:
        result["profile"] = _profile(engine, batches[-1])
    return result


def _profile(engine: Engine, batch: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Milliseconds and calls of each kernel in one micro-batch, longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    tensors = {key: value for key, value in batch.items() if key != "real_tokens"}
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        engine.forward_backward(tensors, 1000)
        torch.cuda.synchronize()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.device_time_total)
    lines = [(row.key[:110], row.device_time_total / 1e3, row.count) for row in rows if row.device_time_total > 0]
    print(f"PROFILE total {sum(line[1] for line in lines):.1f} ms", flush=True)
    for name, milliseconds, count in lines[:40]:
        print(f"{milliseconds:9.2f} ms {count:6d}  {name}", flush=True)
    return lines


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.startswith("--")] or ["W1", "W2", "W3"]
    results = []
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if "--as-a-t4" in sys.argv:
        dtype = torch.float16
        mock.patch("slimtune.engine.inputs.choose", return_value="efficient").start()
    for name in names:
        try:
            results.append(measure(name, "--profile" in sys.argv, dtype))
        except Exception as error:  # noqa: BLE001 - the other workloads still count
            import traceback

            traceback.print_exc()
            results.append({"workload": name, "error": f"{type(error).__name__}: {error}"[:300]})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / "engine.json").write_text(json.dumps(results, indent=1))
    print("\nworkload     step_ms  tokens/s  alloc  reserved  first_s")
    for result in results:
        if "error" in result:
            print(f"{result['workload']:12s} {result['error']}")
        else:
            print(
                f"{result['workload']:12s} {result['step_ms']:8.2f} {result['tokens_s']:9d} "
                f"{result['peak_allocated_gib'] or 0:6.2f} {result['peak_reserved_gib'] or 0:6.2f} "
                f"{result['first_step_s']:7.2f}"
            )


if __name__ == "__main__":
    main()
