"""What a checkpoint costs the demo's run: seconds that training waits, and seconds that the thread behind it works.

    python benchmarks/save_cost.py OUT.json

The demo's training, whole, at the default interval (ten saves in a run).
"""

from __future__ import annotations

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

from slimtune.base.embedded import EMBEDDED  # noqa: E402
from slimtune.config import Config  # noqa: E402
from slimtune.demo import DEMO_SETTINGS, rows  # noqa: E402
from slimtune.hardware import detect  # noqa: E402
from slimtune.recipes import finetune  # noqa: E402
from slimtune.run.environment import library_versions  # noqa: E402
from slimtune.training.checkpoint import Checkpoints  # noqa: E402
from slimtune.training.resumable import ResumableTrainer  # noqa: E402


def timed(function: Callable[..., Any], clock: Callable[[], float], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = clock()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(clock() - began)

    return call


def main(out: Path) -> None:
    waits: list[float] = []
    behind: list[float] = []
    processor: list[float] = []
    ResumableTrainer._save_checkpoint = timed(ResumableTrainer._save_checkpoint, time.perf_counter, waits)
    Checkpoints._save = timed(timed(Checkpoints._save, time.thread_time, processor), time.perf_counter, behind)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "demo.jsonl"
        lines = [json.dumps({"messages": row.messages}) for row in rows()[0]]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        run = finetune(Config.make(model=EMBEDDED, data=(str(data),), output=Path(folder) / "run", **DEMO_SETTINGS))
        steps = [record["step_seconds"] for record in run.metrics() if "step_seconds" in record]
        size = sum(file.stat().st_size for file in next(run.checkpoints.iterdir()).iterdir())
    # The last save waits for nothing and nothing waits for it but the end; it counts like the others.
    training = sum(steps)
    result = {
        "date": date.today().isoformat(),
        "machine": detect().name,
        "steps": len(steps),
        "step_seconds": round(median(steps), 3),
        "saves": len(waits),
        "checkpoint_bytes": size,
        "training_waits_seconds": round(median(waits), 4),
        "thread_seconds": round(median(behind), 4),
        "thread_processor_seconds": round(median(processor), 4),
        "share_of_the_run_if_nothing_overlapped": round((sum(waits) + sum(behind)) / training, 4),
        "share_that_training_waits": round(sum(waits) / training, 4),
        "versions": library_versions(),
    }
    print(json.dumps(result, indent=2))
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
