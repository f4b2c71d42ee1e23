"""Reliability on a GPU: kills in training and saves, NaN in every place, memory that runs out, runs that repeat.

    python benchmarks/gpu_reliability.py OUT.json        about three minutes on 8 or more cores

Runs are the command line's own, each in a process of its own, several at a time on the one GPU. With no GPU it refuses.
What isn't as it should be is a line under ``failures``, and the exit code 1.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ["CAMPAIGN_START"] = "spawn"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from safetensors.torch import load_file  # noqa: E402

from slimtune.hardware import detect  # noqa: E402
from slimtune.run.environment import library_versions  # noqa: E402
from slimtune.training.checkpoint import nonfinite  # noqa: E402
from tests.campaigns import campaign  # noqa: E402
from tests.campaigns.campaign import Process  # noqa: E402
from tests.campaigns.test_kill import kill_at_random  # noqa: E402

KILLED_RUNS, AT_ONCE, SECONDS_FOR_KILLS = 8, 8, 75
OPTIONS = [*campaign.OPTIONS, "--compute-dtype", "bf16", "--optim", "paged_adamw_8bit"]
PLACES = ("loss", "gradient", "parameter", "optimizer state")


class Bench:
    """The folder of the runs, and what they must equal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = campaign.make_model(folder / "model", hidden=256)
        self.wide = campaign.make_model(folder / "wide", hidden=1024)  # its steps take memory that counts
        self.rows = campaign.make_rows(folder / "rows.jsonl", 48)
        self.many = campaign.make_rows(folder / "many.jsonl", 2048)
        self.failures: list[str] = []
        self.whole: dict[str, Path] = {}
        self.flags: dict[str, list[str]] = {}

    def train(self, run: Path, *more: str) -> list[str]:
        return ["train", str(self.model), str(self.rows), "-o", str(run), *OPTIONS, *more]

    def start(self, arguments: list[str], name: str, before: str = "", **values: Any) -> Process:
        return Process(arguments, self.folder / f"{name}.log", before, **values)

    def expect(self, good: bool, what: str, process: Process | None = None) -> None:
        if not good:
            self.failures.append(what + (f": {process.output()[-600:]}" if process else ""))

    def references(self, engine: str) -> str:
        """Uninterrupted runs, two as they are and two with --deterministic: are they equal to each other on this GPU?

        With the flag they must be; the runs that are killed are run with it and compared with these.
        """
        found = {}
        for kind, flags in (("plain flags", []), ("--deterministic", ["--deterministic"])):
            runs = [self.folder / f"whole-{engine}-{kind.strip('-').replace(' ', '-')}-{number}" for number in (1, 2)]
            processes = [self.start(self.train(run, "--engine", engine, *flags), run.name) for run in runs]
            good = [process.wait() for process in processes] == [0, 0]
            self.expect(good, f"reference {engine}, {kind}", processes[0])
            if good:
                self.whole[engine], self.flags[engine] = runs[0], flags
            found[kind] = "equal" if good and len({campaign.adapter_sha256(run) for run in runs}) == 1 else "differ"
        self.expect(found["--deterministic"] == "equal", f"two --deterministic runs on the {engine} engine differ")
        return f"{engine}: {found}"

    def kills(self, seed: int, engine: str, deadline: float) -> Counter[str]:
        """Row 1: one run, killed again and again, then finished and compared."""
        chance, run, done = random.Random(seed), self.folder / f"killed-{seed}", Counter[str]()
        arguments = self.train(run, "--engine", engine, *self.flags[engine])
        while done.total() < 5 and time.monotonic() < deadline:
            process = self.start(arguments, run.name)
            if not kill_at_random(process, run, chance):
                break
            done["in a save" if campaign.in_a_save(run) else "elsewhere"] += 1
            arguments = ["resume", str(run)]
        process = self.start(["resume", str(run)], run.name)
        self.expect(process.wait() == 0, f"resume of {run.name}", process)
        equal = campaign.trajectory(run) == campaign.trajectory(self.whole[engine]) and campaign.adapter_sha256(
            run
        ) == campaign.adapter_sha256(self.whole[engine])
        self.expect(equal, f"{run.name} ({engine}) differs from the uninterrupted run")
        done["runs"], done["equal"] = 1, int(equal)
        return done

    def poisoned(self, where: str, engine: str) -> str:
        """Row 7: found in its step, nothing bad on the disk."""
        run = self.folder / f"poisoned-{engine}-{where.replace(' ', '-')}"
        process = self.start(
            self.train(run, "--engine", engine), run.name, "tests.campaigns.faults:poison", where=where, step=5
        )
        code = process.wait()
        good = code == 3 and "in step 5" in process.output() and max(campaign.trajectory(run)) == 4
        good = good and not any(nonfinite(load_file(file)) for file in run.rglob("*.safetensors"))
        good = good and ("rows.jsonl:" in process.output()) == (where in ("loss", "gradient"))
        self.expect(good, f"{where} on {engine}, exit {code}", process)
        return f"{where} ({engine}): {'same step, exit 3, no bad file' if good else 'FAILED'}"

    def skipped(self, engine: str) -> str:
        run = self.folder / f"skipped-{engine}"
        arguments = self.train(run, "--engine", engine, "--on-nonfinite", "skip")
        process = self.start(arguments, run.name, "tests.campaigns.faults:poison", where="gradient", step=5)
        good = process.wait() == 0 and len(_events(run, "skipped")) == 1
        self.expect(good, f"skip on {engine}", process)
        return f"skip ({engine}): {'one batch left out, exit 0' if good else 'FAILED'}"

    def saved_while_recording(self) -> str:
        """Padded rows, new lengths at nearly every step: graphs are recorded while the thread behind saves."""
        run = self.folder / "recording"
        arguments = self.train(run, "--engine", "fused", "--no-packing", "--micro-batch", "2", "--save-steps", "1")
        process = self.start(arguments, run.name)
        good = process.wait() == 0 and not _events(run, "save_failed")
        self.expect(good, "saving while graphs are recorded", process)
        return f"{len(campaign.trajectory(run))} steps, each saved" if good else "FAILED"

    def starved(self, engine: str) -> str:
        """Row 9: the card is really full; this run must have it alone."""
        run = self.folder / f"starved-{engine}"
        arguments = ["train", str(self.wide), str(self.many), "-o", str(run), *OPTIONS, "--engine", engine]
        arguments += ["--gradient-accumulation", "1", "--max-steps", "10", "--micro-batch", "1024", "--no-packing"]
        process = self.start(arguments, run.name, "tests.campaigns.faults:fill_card", step=5)
        code, found = process.wait(), _events(run, "out_of_memory")
        filled = next(
            (line for line in process.output().splitlines() if "MiB filled" in line), "the card wasn't filled"
        )
        good = code == 0 and bool(found) and found[0]["step"] == 5 and filled[0].isdigit()
        self.expect(good, f"out of memory on {engine}, exit {code}, {found}", process)
        done = f"halved to {found[-1]['pieces']} pieces and went on" if good else "FAILED"
        return f"{engine}: {filled}: {done}"


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return [record for record in map(json.loads, lines) if record.get("event") == kind]


def main(out: Path) -> int:
    hardware = detect()
    if hardware.device != "cuda":
        print("this needs a GPU")
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        bench = Bench(Path(folder))
        repeats = [bench.references(engine) for engine in ("fused", "plain")]
        print(f"references {time.monotonic() - began:.0f} s", flush=True)
        deadline = time.monotonic() + SECONDS_FOR_KILLS
        killed = [pool.submit(bench.kills, seed, ("fused", "plain")[seed % 2], deadline) for seed in range(KILLED_RUNS)]
        numbers = [pool.submit(bench.poisoned, where, engine) for engine in ("fused", "plain") for where in PLACES]
        numbers += [pool.submit(bench.skipped, engine) for engine in ("fused", "plain")]
        recording = pool.submit(bench.saved_while_recording)
        kills = sum((future.result() for future in killed), Counter[str]())
        stopped = [future.result() for future in numbers]
        result = {
            "date": date.today().isoformat(),
            "gpu": hardware.name,
            "two_uninterrupted_runs": repeats,
            "kills": kills["in a save"] + kills["elsewhere"],
            "kills_in_a_save": kills["in a save"],
            "killed_runs": kills["runs"],
            "killed_runs_equal": kills["equal"],
            "nonfinite": stopped,
            "saves_while_graphs_are_recorded": recording.result(),
            "out_of_memory": [bench.starved(engine) for engine in ("fused", "plain")],
            "failures": bench.failures,
            "seconds": round(time.monotonic() - began),
            "versions": library_versions(),
        }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
