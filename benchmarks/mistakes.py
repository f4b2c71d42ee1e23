"""Seconds until a mistake is answered, beside ``--help``'s: python benchmarks/mistakes.py OUT.json [--repeats 10]

Each command is a process of its own, as a person starts it, the files it reads being in the page cache. Which modules
a mistake may import is tested in tests/cli/test_main.py; here stands what that comes to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from slimtune.run.environment import library_versions  # noqa: E402

MISTAKES = {
    "--help": (0, ["--help"]),
    "no arguments": (2, []),
    "no data": (2, ["train", "smollm2-135m"]),
    "a missing file": (2, ["train", "smollm2-135m", "row.jsonl"]),
    "an existing folder": (2, ["train", "smollm2-135m", "rows.jsonl", "-o", "runs/first"]),
    "an unknown model": (2, ["chat", "smolm2-135m"]),
    "an unknown run": (2, ["resume", "runs/frist"]),
    "an unknown flag": (2, ["train", "--lora-rank", "8"]),
    "an unknown verb": (2, ["trian"]),
    "a value that can't be": (2, ["train", "smollm2-135m", "rows.jsonl", "--lora-r", "x"]),
}


def seconds(words: list[str], folder: Path, code: int) -> tuple[float, float]:
    """Wall time of one command, and its processor time, which other processes on the machine hardly change.

    Raises:
        RuntimeError: It ended otherwise than it should.
    """
    command = [sys.executable, "-c", "from slimtune.cli import main; main()", *words]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
                          capture_output=True, text=True, check=False)  # fmt: skip
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(f"{words}: exit {done.returncode}\n{done.stderr}")
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def processor() -> str:
    """Its name, as Linux knows it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs" / "first").mkdir(parents=True)
        (folder / "runs" / "first" / "config.yaml").write_text("model: smollm2-135m\n", encoding="utf-8")
        (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
        taken: dict[str, list[tuple[float, float]]] = {case: [] for case in MISTAKES}
        for _ in range(options.repeats + 1):  # by turns, as a machine's load changes; the first turn fills the cache
            for case, (code, words) in MISTAKES.items():
                taken[case].append(seconds(words, folder, code))
    cases = [
        {
            "case": case,
            "seconds": round(median(wall for wall, _ in each[1:]), 3),
            "processor_seconds": round(median(busy for _, busy in each[1:]), 3),
        }
        for case, each in taken.items()
    ]
    found = {
        "date": date.today().isoformat(),
        "machine": processor(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": library_versions(),
        "repeats": options.repeats,
        "mistakes": cases,
    }
    options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for each in cases:
        print(f"{each['seconds']:6.3f} s  {each['processor_seconds']:6.3f} s of a processor  {each['case']}")


if __name__ == "__main__":
    main()
