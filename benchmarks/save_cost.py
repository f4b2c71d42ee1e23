"""What a checkpoint costs a run: seconds that training waits, and seconds that the thread behind it works.

    python benchmarks/save_cost.py OUT.json                the demo's training, whole, at the default interval
    python benchmarks/save_cost.py OUT.json --size 1.8b    a random model on a GPU, workload W1, a save every 4 steps
    python benchmarks/save_cost.py OUT.json --size moe     a mixture, every layer and expert adapted, r=16
    … --every 40                                           steps from one save to the next, where disks are slower

On a GPU a wait is from the moment the device has nothing left to do until it can be given the next step, the copies
off it done; beside it stands what the copies alone take, what copying the same tensors one by one does, and how much
longer the steps after a save are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import decoders  # noqa: E402
import torch  # noqa: E402
from peers import as_messages, documents, make_folder  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

from slimtune.base.embedded import EMBEDDED  # noqa: E402
from slimtune.config import Config  # noqa: E402
from slimtune.demo import DEMO_SETTINGS, rows  # noqa: E402
from slimtune.hardware import detect  # noqa: E402
from slimtune.recipes import finetune  # noqa: E402
from slimtune.run.environment import library_versions  # noqa: E402
from slimtune.training.checkpoint import Checkpoints, OffDevice, to_plain  # noqa: E402
from slimtune.training.resumable import ResumableTrainer  # noqa: E402

SAVES, EVERY = 9, 4


def timed(function: Callable[..., Any], clock: Callable[[], float], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = clock()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(clock() - began)

    return call


def device_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def the_demo(folder: Path) -> Config:
    data = folder / "demo.jsonl"
    lines = [json.dumps({"messages": row.messages}) for row in rows()[0]]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Config.make(model=EMBEDDED, data=(str(data),), output=folder / "run", **DEMO_SETTINGS)


def the_workload(folder: Path, size: str, every: int) -> Config:
    if size in decoders.SHAPES:
        workload = decoders.ALL
        decoders.make_folder(folder / "model", size)
    else:
        workload = WORKLOADS["W1" if size == "1.8b" else size]
        make_folder(size, folder / "model")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(as_messages(row)) + "\n" for row in documents(workload, factor=3)))
    return Config.make(
        model=str(folder / "model"), data=(str(data),), output=folder / "run", train_on="all", engine="fused",
        max_length=workload.length, micro_batch=workload.rows, gradient_accumulation=1, max_steps=SAVES * every,
        save_steps=every, targets=workload.targets, lora_r=workload.r, lora_dropout=workload.dropout,
        eval_share=0.0,
    )  # fmt: skip


def copy_alone(trainer: ResumableTrainer) -> float:
    """Seconds to copy the storages of adapter and optimizer off the device, as a save does it."""
    tensors = trainer._trained().storages()
    began = device_clock()
    OffDevice(tensors).of({})
    return device_clock() - began


def copy_one_by_one(trainer: ResumableTrainer) -> float:
    """Seconds to copy adapter and optimizer off the device tensor by tensor, as saving a state dict does."""
    tensors = [*trainer._adapter.values(), *to_plain(trainer.optimizer.state_dict())[1].values()]
    began = device_clock()
    for tensor in tensors:
        tensor.detach().to("cpu", copy=True)
    return device_clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size")
    parser.add_argument("--every", type=int, default=EVERY, help="steps from one save to the next")
    options = parser.parse_args()
    waits: list[float] = []
    behind: list[float] = []
    processor: list[float] = []
    copies: dict[str, list[float]] = {}
    save = timed(ResumableTrainer._save_checkpoint, device_clock, waits)

    def save_and_compare(trainer: ResumableTrainer, *arguments: Any) -> None:
        save(trainer, *arguments)
        if torch.cuda.is_available() and trainer.state.global_step == trainer.state.max_steps:
            for copy in (copy_alone, copy_one_by_one):
                copies[f"{copy.__name__}_seconds"] = [round(copy(trainer), 5) for _ in range(len(waits))]

    ResumableTrainer._save_checkpoint = save_and_compare
    Checkpoints._save = timed(timed(Checkpoints._save, time.thread_time, processor), time.perf_counter, behind)
    with tempfile.TemporaryDirectory() as folder:
        config = the_workload(Path(folder), options.size, options.every) if options.size else the_demo(Path(folder))
        run = finetune(config)
        steps = {record["step"]: record["step_seconds"] for record in run.metrics() if "step_seconds" in record}
        size = sum(file.stat().st_size for file in next(run.checkpoints.iterdir()).iterdir())
    # The last save waits for nothing and nothing waits for it but the end; it counts like the others.
    training = sum(steps.values())
    result = {
        "date": date.today().isoformat(),
        "machine": detect().name,
        "steps": len(steps),
        "step_seconds": round(median(steps.values()), 4),
        "saves": len(waits),
        "checkpoint_bytes": size,
        "training_waits_seconds": round(median(waits), 5),
        "thread_seconds": round(median(behind), 4),
        "thread_processor_seconds": round(median(processor), 4),
        "share_of_the_run_if_nothing_overlapped": round((sum(waits) + sum(behind)) / training, 4),
        "share_that_training_waits": round(sum(waits) / training, 5),
    }
    if copies:
        after = [seconds for step, seconds in steps.items() if step > options.every and step % options.every == 1]
        others = [seconds for step, seconds in steps.items() if step > options.every and step % options.every != 1]
        result |= {
            "all_waits_seconds": [round(wait, 5) for wait in waits],
            **{name: median(seconds) for name, seconds in copies.items()},
            "all_copies_seconds": copies,
            "step_after_a_save_seconds": round(median(after), 4),
            "other_steps_seconds": round(median(others), 4),
        }
    result["versions"] = library_versions()
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
